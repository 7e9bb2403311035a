"""Every DeepSpeed file in config/, as the pinned transformers fills it in and the pinned DeepSpeed reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.conftest import problems_of, resolved
from training.options.trainer_options import TrainingOptions
from training.run.prepare import training_arguments

ROOT = Path(__file__).parents[2]
# file -> (precision, is the optimizer in host memory?)
EXPECTED = {
    "ds_z3_bf16_config.json": ("bf16", False),
    "ds_z3_bf16_offload_config.json": ("bf16", True),
    "ds_z3_fp16_offload_config.json": ("fp16", True),
}
FILES = pytest.mark.parametrize("name", EXPECTED)

pytestmark = pytest.mark.usefixtures("one_rank", "at_the_root")


def options(name: str, tmp_path: Path, **changed: Any) -> TrainingOptions:
    return TrainingOptions(
        deepspeed=f"config/{name}",
        local_output_dir=str(tmp_path / "out"),
        lr=3e-5,
        weight_decay=0.1,
        **changed,
    )


def filled(options: TrainingOptions) -> dict[str, Any]:
    """The options' DeepSpeed file with every "auto" replaced, by the Trainer's own two steps."""
    before = dict(os.environ)  # TrainingArguments writes what accelerate shall read into it
    try:
        args = training_arguments(resolved(options))
        tiny = GPTJConfig(vocab_size=8, n_positions=8, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
        args.hf_deepspeed_config.trainer_config_finalize(args, GPTJForCausalLM(tiny), num_training_steps=10)
        return args.hf_deepspeed_config.config
    finally:
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(before)


@FILES
def test_deepspeed_reads_stage_precision_and_offload_and_nothing_is_left_for_a_user_to_fill_in(
    name: str, tmp_path: Path
) -> None:
    precision, offload = EXPECTED[name]
    assert '"auto"' in (ROOT / "config" / name).read_text()
    whole = filled(options(name, tmp_path))
    assert '"auto"' not in json.dumps(whole)
    config = DeepSpeedConfig(whole)
    assert config.zero_optimization_stage == 3
    assert config.bfloat16_config.enabled is (precision == "bf16")
    assert config.float16_config.enabled is (precision == "fp16")
    assert config.zero_config.gather_16bit_weights_on_model_save is True
    assert config.scheduler_name is None
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (8, 8)
    assert config.gradient_accumulation_steps == 1
    assert config.gradient_clipping == 1.0
    assert config.zero_config.offload_param is None
    if offload:
        assert config.zero_config.offload_optimizer.device == "cpu"
        assert config.zero_config.offload_optimizer.pin_memory is True
        assert config.optimizer_name == "adamw"
        assert config.optimizer_params == {
            "lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1,
        }  # fmt: skip
    else:  # torch's AdamW, so that no CUDA toolkit is needed
        assert config.zero_config.offload_optimizer is None
        assert config.optimizer_name is None


@FILES
@pytest.mark.parametrize("asked", [{}, {"named": True}])
def test_a_file_agrees_with_the_options_that_go_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, bool]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    precision, _ = EXPECTED[name]
    assert problems_of(options(name, tmp_path, **{precision: True} if asked else {})) == []


def test_the_files_are_the_three_families_and_differ_only_in_precision_and_offload() -> None:
    assert {file.name for file in (ROOT / "config").glob("*.json")} == set(EXPECTED)
    first, *others = (json.loads((ROOT / "config" / name).read_text()) for name in EXPECTED)
    for each in (first, *others):
        for key in ("bf16", "fp16", "optimizer"):
            each.pop(key, None)
        each["zero_optimization"].pop("offload_optimizer", None)
    assert others == [first, first]
