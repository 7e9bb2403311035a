"""Saves a model, and checks that a saved folder holds a complete model that can answer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from training.consts import GREEDY, SAMPLE_INSTRUCTIONS, WEIGHTS
from training.data.prompt import CONTROL_TOKENS, END_KEY
from training.errors import ModelError, first_line
from training.model.twin import set_cache


def save_model(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    generation: GenerationConfig,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Writes a model's weights, gathered as `state_dict`, with its config and the `generation` settings."""
    former = model.generation_config
    cached, model.generation_config = set_cache(model.config, True), generation
    try:
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    finally:  # with a cache, transformers would let packed rows attend to each other
        model.generation_config = former
        for config in cached:
            config.use_cache = False
    for file in folder.glob(f"*{WEIGHTS}"):  # safetensors writes files that only the owner can read
        shutil.copymode(folder / "config.json", file)


def not_finite(state_dict: dict[str, torch.Tensor], model: PreTrainedModel) -> list[str]:
    """Names of the tensors with NaN or infinite values. A buffer may be infinite: Gemma 4 stores limits in some."""
    largest = zip(state_dict, largest_magnitudes(state_dict.values()), strict=True)
    suspects = [(name, value) for name, value in largest if not math.isfinite(value)]
    if not suspects:
        return []
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return [name for name, value in suspects if math.isnan(value) or name.rpartition(".")[2] not in buffers]


def largest_magnitudes(tensors: Iterable[torch.Tensor]) -> list[float]:
    """The largest absolute value of each tensor: NaN if it holds NaN, else infinite if it holds an infinite number.

    0 for tensors of integers and empty tensors. Waits once for the device. `torch.aminmax` reads weights at memory
    speed, and torch.isfinite on a CPU does not: in bf16 it takes more than ten times as long.
    """
    found = [_largest_magnitude(tensor.detach()) for tensor in tensors]
    device = next((value.device for value in found if value.device.type != "cpu"), "cpu")
    return torch.stack([value.to(device) for value in found]).tolist() if found else []


def _largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """float64 () on the tensor's device."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    has_no_nan = not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2
    if has_no_nan or tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    if tensor.element_size() == 1:  # aminmax knows no float8; bf16 holds all of its values
        tensor = tensor.to(torch.bfloat16)
    return torch.stack(torch.aminmax(tensor)).double().abs().max()  # all three keep NaN


def verify_model(folder: Path, trust_remote_code: bool = False) -> None:
    """Checks, from the files alone, that a folder holds a complete model that can answer.

    Weights must match the config in name, shape and number, and none may be empty, NaN or infinite. Embedding,
    tokenizer and generation config must agree, and greedy decoding must yield a few tokens. Holds one copy of the
    model in host memory, in the precision of its files. Raises ModelError with all problems.
    """
    problems: list[str] = []
    try:
        problems += weight_problems(folder, trust_remote_code)
        problems += _model_problems(folder, trust_remote_code)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        problems.append(first_line(error))
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise ModelError(
            f"{folder} is not a usable model:\n"
            + "\n".join(f"  - {problem}" for problem in problems[:8] + more)
        )


def weight_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """Problems of the tensors in the files. Ignores names: transformers renames some when it saves and loads."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in parameters]
    # parameters() lists a tied weight once.
    expected = sum(tensor.numel() for tensor in [*model.parameters(), *buffers])
    found, problems = 0, []
    for file in sorted(folder.glob(f"*{WEIGHTS}")):
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (not a dict)
        found += sum(tensor.numel() for tensor in tensors.values())
        problems += [f"{name} is empty" for name, tensor in tensors.items() if tensor.numel() == 0]
        problems += [f"{name} holds NaN or infinite numbers" for name in not_finite(tensors, model)]
    if found != expected:
        problems.append(f"its files hold {found:,} numbers, but its config describes {expected:,}")
    return problems


def load_stock(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str]]:
    """(model, problems) as stock transformers loads it. It would initialise missing weights at random."""
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    problems = [f"{name} is missing" for name in sorted(loading_info["missing_keys"])]
    problems += [f"{name} is not of this architecture" for name in sorted(loading_info["unexpected_keys"])]
    problems += [
        f"{name} has the shape {list(found)}, but the config describes {list(expected)}"
        for name, found, expected in sorted(loading_info["mismatched_keys"])
    ]
    return model.eval(), problems


def _model_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """Problems of the loaded model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, problems = load_stock(folder, trust_remote_code)
    if problems:
        return problems
    rows, stop_ids = model.get_input_embeddings().num_embeddings, model.generation_config.eos_token_id
    if len(tokenizer) > rows:
        problems.append(f"the tokenizer has {len(tokenizer):,} tokens, but the embedding only {rows:,} rows")
    split_keys = [
        key for key in CONTROL_TOKENS if len(tokenizer(key, add_special_tokens=False)["input_ids"]) != 1
    ]
    problems += [f"the tokenizer does not keep {key!r} as one token" for key in split_keys]
    if tokenizer.convert_tokens_to_ids(END_KEY) not in (
        stop_ids if isinstance(stop_ids, list) else [stop_ids]
    ):
        problems.append(f"generation_config.json does not stop at {END_KEY!r}")
    if problems:
        return problems
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE_INSTRUCTIONS[0]}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    return answer_problems(model, prompt)


@torch.inference_mode()
def answer_problems(model: PreTrainedModel, prompt: torch.Tensor) -> list[str]:
    """Problems of the greedy answer to a `prompt (1, tokens) int64`."""
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        **GREEDY,
        output_logits=True,
        return_dict_in_generate=True,
    )
    finite = all(torch.isfinite(logits).all() for logits in answer.logits)
    return [] if finite else ["its answer has NaN or infinite logits"]
