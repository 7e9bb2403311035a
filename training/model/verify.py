"""Checks that a saved folder holds a complete model that can answer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training.consts import GREEDY, SAMPLE_INSTRUCTIONS, WEIGHTS
from training.data.prompt import CONTROL_TOKENS, END_KEY
from training.errors import ModelError, first_line


def not_finite(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinite values."""
    return [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]


def verify_model(folder: Path, trust_remote_code: bool = False) -> None:
    """Checks, from the files alone, that a folder holds a complete model that can answer.

    Weights must match the config in name, shape and number, and none may be empty, NaN or infinite. Embedding,
    tokenizer and generation config must agree, and greedy decoding must yield a few tokens. Holds one copy of the
    model in host memory, in the precision of its files. Raises ModelError with all problems.
    """
    problems: list[str] = []
    try:
        problems += _weight_problems(folder, trust_remote_code)
        problems += _answer_problems(folder, trust_remote_code)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        problems.append(first_line(error))
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise ModelError(
            f"{folder} is not a usable model:\n"
            + "\n".join(f"  - {problem}" for problem in problems[:8] + more)
        )


def _weight_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """Problems of the tensors in the files. Ignores names: transformers renames some when it saves and loads."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in parameters]
    expected = sum(
        tensor.numel() for tensor in [*model.parameters(), *buffers]
    )  # parameters() lists a tied weight once
    found, problems = 0, []
    for file in sorted(folder.glob(f"*{WEIGHTS}")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                tensor = weights.get_tensor(name)
                found += tensor.numel()
                if tensor.numel() == 0:
                    problems.append(f"{name} is empty")
                elif not torch.isfinite(tensor).all():
                    problems.append(f"{name} holds NaN or infinite numbers")
    if found != expected:
        problems.append(f"its files hold {found:,} numbers, but its config describes {expected:,}")
    return problems


@torch.inference_mode()
def _answer_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """Problems of the loaded model. Missing weights are reported, as transformers would initialise them at random."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    model.eval()
    problems = [f"{name} is missing" for name in sorted(loading_info["missing_keys"])]
    problems += [f"{name} is not of this architecture" for name in sorted(loading_info["unexpected_keys"])]
    problems += [
        f"{name} has the shape {list(found)}, but the config describes {list(expected)}"
        for name, found, expected in sorted(loading_info["mismatched_keys"])
    ]
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
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        **GREEDY,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if not all(torch.isfinite(logits).all() for logits in answer.logits):
        problems.append("its answer has NaN or infinite logits")
    return problems
