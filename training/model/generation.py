"""Generates answers to prompts in batches, with Dolly's sampling settings."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.consts import DEFAULT_SEED, GREEDY, MAX_NEW_TOKENS, RUN_FILE, SAMPLING
from training.data.conversations import Prompt, prompt_of, turns_of, without_first_turns
from training.data.encoding import encode_turns, join_turns
from training.data.prompt import RESPONSE_KEY
from training.files import expanded
from training.model.attention import use_packed_attention
from training.model.loading import load_model, max_positions
from training.model.tokenizer import generation_config, load_tokenizer
from training.storage.record import finished_run

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # prompts that are answered at once

# (name, MLflow type, default) of the parameters that a served model accepts. A temperature of 0 means greedy decoding.
PARAMETERS: tuple[tuple[str, str, Any], ...] = (
    ("max_new_tokens", "long", MAX_NEW_TOKENS),
    ("temperature", "double", 1.0),
    ("top_p", "double", SAMPLING["top_p"]),
    ("top_k", "long", SAMPLING["top_k"]),
)


def sampling_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `model.generate` for values of PARAMETERS; the others keep their defaults."""
    generation = {name: default for name, _, default in PARAMETERS} | dict(parameters)
    return generation | GREEDY | {"temperature": None} if generation["temperature"] <= 0 else generation


def load_model_tokenizer_for_generate(
    path: str, dtype: torch.dtype | None = None, device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer for generation, from a trained folder or a base model.

    Defaults: half precision on a GPU, float32 on a CPU. Raises ModelError if one of them cannot be loaded, or if the
    training in this folder is not finished.
    """
    path = expanded(path)
    if os.path.isfile(Path(path) / RUN_FILE):  # os.path.isfile returns False where Path.is_file could raise
        finished_run(Path(path))
    device = device or best_device()
    if dtype is None:
        has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        half = torch.bfloat16 if has_bf16 else torch.float16
        dtype = half if device.startswith(("cuda", "mps")) else torch.float32
    tokenizer = load_tokenizer(path, trust_remote_code)
    model = load_model(path, tokenizer, dtype, DEFAULT_SEED, trust_remote_code)
    model.config.use_cache = True
    if model.config.model_type == "gptj":
        use_packed_attention(model)  # a fused kernel with the same results
    return model.eval().to(device), tokenizer


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def generate_response(
    instruction: str,
    input: str | None = None,
    *,
    history: Sequence[Any] = (),
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    **generation: Any,
) -> str:
    """Answers one instruction. See `generate_responses`."""
    ask: dict[str, Any] = {"model": model, "tokenizer": tokenizer, **generation}
    return generate_responses([instruction], [input], histories=[history], **ask)[0]


def generate_responses(
    instructions: Sequence[str],
    inputs: Sequence[str | None] | None = None,
    *,
    histories: Sequence[Sequence[Any]] | None = None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = BATCH_SIZE,
    **generation: Any,
) -> list[str]:
    """Answers every instruction. Returns the text between response key and end key, in order.

    A history is the conversation before its instruction: OpenAI's messages, which may begin with a system message, or
    [question, answer] pairs. `generation` takes any argument of `model.generate` and overrides Dolly's sampling
    (`max_new_tokens=256, do_sample=True, top_p=0.92, top_k=0`). Prompts are batched by length and padded on the left.
    `prompt_ids` says what is cut if a prompt leaves no room for `max_new_tokens`.

    Raises DataError if a history cannot be used.
    """
    inputs = inputs if inputs is not None else [None] * len(instructions)
    histories = histories if histories is not None else [()] * len(instructions)
    prompts = [
        prompt_of(instruction, input, history)
        for instruction, input, history in zip(instructions, inputs, histories, strict=True)
    ]
    return answer_prompts(prompts, model=model, tokenizer=tokenizer, batch_size=batch_size, **generation)


@torch.inference_mode()
def answer_prompts(
    prompts: Sequence[Prompt],
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = BATCH_SIZE,
    **generation: Any,
) -> list[str]:
    """Answers every prompt. See `generate_responses`."""
    max_prompt_tokens = max_positions(model.config) - int(generation.get("max_new_tokens", MAX_NEW_TOKENS))
    ids = prompt_ids(tokenizer, prompts, max_prompt_tokens)
    answers = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = answer_batch([ids[i] for i in batch], model, tokenizer, model.device, **generation)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
    return answers


def answer_batch(
    prompts: Sequence[Sequence[int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    **generation: Any,
) -> list[str]:
    """Answers one batch of prompts given as token ids. Under ZeRO-3, all ranks must call this equally often."""
    answers = answer_ids(prompts, model, tokenizer, device, **generation)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_ids(
    prompts: Sequence[Sequence[int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    **generation: Any,
) -> torch.Tensor:
    """The new tokens `(rows, tokens) int64` of a batch of prompts. An answer that ended is followed by the pad token."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    config = generation_config(tokenizer)
    output = model.generate(
        ids.to(device), attention_mask=mask.to(device), generation_config=config, **generation
    )
    return output[:, longest:]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt, as the chat template renders its messages.

    A prompt of more than `max_tokens` loses the oldest turns of its history, but not their system message, which goes
    before the first turn that stays. If it is still too long without any turn, the end of the question is cut. Warnings
    say so. Raises ValueError if not even an empty prompt fits.
    """
    response_key = tokenizer.convert_tokens_to_ids(RESPONSE_KEY)
    ids = []
    for prompt, (before, body) in zip(prompts, _encode(tokenizer, prompts), strict=True):
        if prompt.history and len(before) + len(body) + 1 > max_tokens:
            before, body = _without_oldest_turns(tokenizer, prompt, max_tokens)
        room = max_tokens - len(before) - 1
        if room < 1:
            raise ValueError(
                f"max_new_tokens leaves {max(0, max_tokens)} of the model's positions for the prompt, "
                f"which needs at least {len(before) + 2}. Ask for fewer new tokens"
            )
        if len(body) > room:
            logger.warning(
                "a prompt of %d tokens was cut to %d, to leave room for the answer", len(body), room
            )
        ids.append([*before, *body[:room], response_key])
    return ids


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> list[tuple[list[int], list[int]]]:
    """Token ids (before, body) of each prompt: up to the last instruction key, and from there to the response key."""
    encoded = encode_turns(tokenizer, [turns_of(prompt) for prompt in prompts])
    return [([*join_turns(tokenizer, earlier), *head], body) for *earlier, (head, body, _) in encoded]


def _without_oldest_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_tokens: int
) -> tuple[list[int], list[int]]:
    """The parts of a prompt without as many of its oldest turns as it takes to fit; without all if that is too few."""
    turns = len(prompt.history)

    def parts(left_out: int) -> tuple[list[int], list[int]]:
        return _encode(tokenizer, [without_first_turns(prompt, left_out)])[0]

    left_out = 1 + bisect_left(
        range(1, turns), True, key=lambda count: sum(map(len, parts(count))) + 1 <= max_tokens
    )
    logger.warning(
        "the first %d of %d turns before a question were left out, to leave room for the answer",
        left_out,
        turns,
    )
    return parts(left_out)
