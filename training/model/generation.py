"""Generates answers to prompts in batches, with Dolly's sampling settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.consts import DEFAULT_SEED, GREEDY, MAX_NEW_TOKENS, RUN_FILE, SAMPLING
from training.data.encoding import encode_prompts
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    **generation: Any,
) -> str:
    """Answers one instruction. See `generate_responses`."""
    return generate_responses([instruction], [input], model=model, tokenizer=tokenizer, **generation)[0]


@torch.inference_mode()
def generate_responses(
    instructions: Sequence[str],
    inputs: Sequence[str | None] | None = None,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = BATCH_SIZE,
    **generation: Any,
) -> list[str]:
    """Answers every instruction. Returns the text between response key and end key, in order.

    `generation` takes any argument of `model.generate` and overrides Dolly's sampling (`max_new_tokens=256,
    do_sample=True, top_p=0.92, top_k=0`). Prompts are batched by length and padded on the left. If a prompt leaves
    no room for `max_new_tokens`, the end of the user's text is cut, never the response key.
    """
    inputs = inputs if inputs is not None else [None] * len(instructions)
    max_prompt_tokens = max_positions(model.config) - int(generation.get("max_new_tokens", MAX_NEW_TOKENS))
    prompts = prompt_ids(tokenizer, instructions, inputs, max_prompt_tokens)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = answer_batch([prompts[i] for i in batch], model, tokenizer, model.device, **generation)
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
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    inputs: Sequence[str | None],
    max_tokens: int,
) -> list[list[int]]:
    """Token ids of each prompt, cut to `max_tokens`. Raises ValueError if not even an empty prompt fits."""
    response_key = tokenizer.convert_tokens_to_ids(RESPONSE_KEY)
    prompts = []
    for head, body in zip(*encode_prompts(tokenizer, instructions, inputs), strict=True):
        room = max_tokens - len(head) - 1
        if room < 1:
            raise ValueError(
                f"max_new_tokens leaves {max(0, max_tokens)} of the model's positions for the prompt, "
                f"which needs at least {len(head) + 2}. Ask for fewer new tokens"
            )
        if len(body) > room:
            logger.warning(
                "a prompt of %d tokens was cut to %d, to leave room for the answer", len(body), room
            )
        prompts.append([*head, *body[:room], response_key])
    return prompts
