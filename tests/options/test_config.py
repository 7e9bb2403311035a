"""DeepSpeed files of config/, completed by the pinned transformers and parsed by the pinned DeepSpeed."""

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
# file -> (precision, whether the optimizer is in host memory)
EXPECTED = {
    "ds_z3_bf16_config.json": ("bf16", False),
    "ds_z3_bf16_offload_config.json": ("bf16", True),
    "ds_z3_fp16_offload_config.json": ("fp16", True),
}
FILES = pytest.mark.parametrize("name", EXPECTED)

pytestmark = pytest.mark.usefixtures("one_rank", "in_repository_root")


def options(name: str, tmp_path: Path, **changed: Any) -> TrainingOptions:
    return TrainingOptions(
        deepspeed=f"config/{name}",
        local_output_dir=str(tmp_path / "out"),
        lr=3e-5,
        weight_decay=0.1,
        **changed,
    )


def filled(options: TrainingOptions) -> dict[str, Any]:
    """The options' DeepSpeed file with every "auto" replaced, by the same two calls as in Trainer."""
    before = dict(os.environ)  # TrainingArguments sets variables for accelerate
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
def test_deepspeed_parses_stage_precision_and_offload_and_no_auto_remains(name: str, tmp_path: Path) -> None:
    precision, offload = EXPECTED[name]
    assert '"auto"' in (ROOT / "config" / name).read_text()
    completed = filled(options(name, tmp_path))
    assert '"auto"' not in json.dumps(completed)
    config = DeepSpeedConfig(completed)
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
@pytest.mark.parametrize("explicit", [False, True])
def test_a_file_is_accepted_with_its_precision_as_option_and_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, explicit: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    precision, _ = EXPECTED[name]
    assert problems_of(options(name, tmp_path, **{precision: True} if explicit else {})) == []


def test_the_files_differ_only_in_precision_and_offload() -> None:
    assert {file.name for file in (ROOT / "config").glob("*.json")} == set(EXPECTED)
    first, *others = (json.loads((ROOT / "config" / name).read_text()) for name in EXPECTED)
    for config in (first, *others):
        for key in ("bf16", "fp16", "optimizer"):
            config.pop(key, None)
        config["zero_optimization"].pop("offload_optimizer", None)
    assert others == [first, first]
