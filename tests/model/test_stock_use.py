"""Stock transformers answers from a trained folder as this project does, id for id: text, batch, pipeline, server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    pipeline,
)
from transformers.cli.serving.utils import (
    BaseHandler,
    GenerateManager,
    GenerationState,
    Modality,
    parse_assistant_message,
)

from tests.model.tokenizer_kinds import byte_level, llama, unigram
from training.data.prompt import question, render_prompt
from training.generate import generate_responses, load_model_tokenizer_for_generate
from training.model.loading import load_config, load_model
from training.model.tokenizer import generation_config, load_tokenizer, saved_form
from training.model.verify import save_model

PROMPTS = [
    ("Name a river.", ""),
    ("Reverse the words.", "one two  three"),
    (" Say: café,\n\t- 1,5 ", ""),
    ("x", ""),
]
NEW_TOKENS = 10


def small(kind: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return kind(vocab_size=720, max_position_embeddings=512, **{"initializer_range": 0.3} | sizes | more)


# Architecture, and a kind of tokenizer that its models have.
BASES: dict[str, tuple[Callable[[Path], None], PreTrainedConfig]] = {
    "gptj": (byte_level, GPTJConfig(vocab_size=720, n_positions=512, n_embd=32, n_layer=2, n_head=2, rotary_dim=8,
                                    initializer_range=0.3)),
    "llama": (llama, small(LlamaConfig, num_key_value_heads=1)),
    "mistral": (lambda folder: llama(folder, legacy=True), small(MistralConfig, num_key_value_heads=1)),
    "gpt_neox": (lambda folder: unigram(folder, "always", "<s>", "</s>"), small(GPTNeoXConfig, initializer_range=0.8)),
    "qwen2": (lambda folder: byte_level(folder, "[gMASK] <sop>"), small(Qwen2Config, num_key_value_heads=1)),
}  # fmt: skip


@dataclass
class Trained:
    """The folder of a run, what stock transformers loads from it, and this project's greedy answers to PROMPTS."""

    folder: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    ids: list[list[int]]

    def cut(self, ids: list[int]) -> list[int]:
        """The ids before the first that ends an answer."""
        stops = [at for at, id in enumerate(ids) if id in self.model.generation_config.eos_token_id]
        return ids[: stops[0]] if stops else ids


@pytest.fixture(scope="module", params=list(BASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A random model with the files that a run writes."""
    write_tokenizer, config = BASES[request.param]
    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "trained"))
    write_tokenizer(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer = saved_form(load_tokenizer(str(base)), load_config(str(base)))
    model = load_model(str(base), tokenizer, torch.float32, seed=42)
    save_model(model, model.state_dict(), generation_config(tokenizer), folder, "5GB")
    tokenizer.save_pretrained(folder)

    model, tokenizer = load_model_tokenizer_for_generate(str(folder), device="cpu")
    greedy = {"do_sample": False, "top_p": None, "top_k": None, "max_new_tokens": NEW_TOKENS}
    instructions, inputs = zip(*PROMPTS, strict=True)
    ask = {"model": model, "tokenizer": tokenizer, **greedy}
    texts = generate_responses(instructions, inputs, **ask)
    with patch.object(
        tokenizer, "batch_decode", lambda ids, **_: [" ".join(map(str, row)) for row in ids.tolist()]
    ):
        rows = [[int(id) for id in row.split()] for row in generate_responses(instructions, inputs, **ask)]
    stock = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = Trained(str(folder), *stock, texts, [])
    answers.ids = [answers.cut(row) for row in rows]
    assert len({tuple(row) for row in answers.ids}) == len(PROMPTS)  # all different, so a wrong prompt shows
    return answers


def messages(instruction: str, input: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question(instruction, input)}]


def test_text_is_answered_alike_alone_and_in_a_batch(trained: Trained) -> None:
    texts = [render_prompt(*prompt) for prompt in PROMPTS]
    ask = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    for some in ([[text] for text in texts], [texts]):
        answers = []
        for batch in some:
            inputs = trained.tokenizer(batch, padding=True, return_tensors="pt")
            output = trained.model.generate(**inputs, **ask)
            answers += output[:, inputs["input_ids"].shape[1] :].tolist()
        assert [trained.cut(ids) for ids in answers] == trained.ids


def test_a_pipeline_answers_text_and_messages_alike(trained: Trained) -> None:
    ask = pipeline("text-generation", model=trained.folder, device="cpu")
    how = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_tensors": True}
    texts, chats = [render_prompt(*prompt) for prompt in PROMPTS], [messages(*prompt) for prompt in PROMPTS]
    for prompts in (texts, chats):
        for batch_size in (1, 2):
            answers = [
                answer["generated_token_ids"] for [answer] in ask(prompts, batch_size=batch_size, **how)
            ]
            assert [trained.cut(list(ids)[-NEW_TOKENS:]) for ids in answers] == trained.ids

    del how["return_tensors"]
    for batch_size in (1, 2):
        replies = [reply["generated_text"][-1] for [reply] in ask(chats, batch_size=batch_size, **how)]
        assert [reply["content"].strip() for reply in replies] == trained.texts
        assert {reply["role"] for reply in replies} == {"assistant"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_server_answers_alike_whatever_form_the_messages_have(trained: Trained) -> None:
    """The code of `transformers serve` between a request of an OpenAI client and the answer."""
    handler, manager = BaseHandler(None, GenerationState()), GenerateManager()
    system = {"role": "system", "content": ""}
    for number, prompt in enumerate(PROMPTS):
        [message] = messages(*prompt)
        parts = {"role": "user", "content": [{"type": "text", "text": message["content"]}]}
        for chat in ([message], [parts], [system, parts]):
            requested = handler.get_processor_inputs_from_messages(chat, Modality.LLM)
            inputs = trained.tokenizer.apply_chat_template(
                requested, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
            )
            config = handler._build_generation_config({"temperature": 0}, trained.model.generation_config)
            config.max_new_tokens = NEW_TOKENS
            answer = manager.generate_non_streaming(trained.model, trained.tokenizer, inputs, config, "1")
            text, _, ids = asyncio.run(answer)
            assert trained.cut(ids.tolist()) == trained.ids[number]
            sent, _, _ = parse_assistant_message(
                trained.tokenizer, trained.model, ids, inputs["input_ids"], text
            )
            assert sent.strip() == trained.texts[number]
            # Others give the parts to the template.
            direct = trained.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert [direct] == inputs["input_ids"].tolist()
