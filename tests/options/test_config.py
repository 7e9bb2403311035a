"""DeepSpeed files of config/, completed by the pinned transformers and parsed by the pinned DeepSpeed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.conftest import problems_of, resolved
from training.options.deepspeed import fill_bucket_sizes, for_engine, read_zero
from training.options.trainer_options import TrainingOptions
from training.run.prepare import training_arguments

ROOT = Path(__file__).parents[2]
# file -> (ZeRO stage, precision, whether the optimizer is in host memory)
EXPECTED = {
    "ds_z3_bf16_config.json": (3, "bf16", False),
    "ds_z3_bf16_offload_config.json": (3, "bf16", True),
    "ds_z3_fp16_config.json": (3, "fp16", False),
    "ds_z3_fp16_offload_config.json": (3, "fp16", True),
    "ds_z3_fp32_config.json": (3, "fp32", False),
    "ds_z2_bf16_config.json": (2, "bf16", False),
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
    stage, precision, offload = EXPECTED[name]
    assert '"auto"' in (ROOT / "config" / name).read_text()
    completed = filled(options(name, tmp_path))
    assert '"auto"' not in json.dumps(completed)
    config = DeepSpeedConfig(completed)
    assert config.zero_optimization_stage == stage
    assert config.bfloat16_config.enabled is (precision == "bf16")
    assert config.float16_config.enabled is (precision == "fp16")
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
    _, precision, _ = EXPECTED[name]
    typed = {"bf16": False} if precision == "fp32" else {precision: True}
    assert problems_of(options(name, tmp_path, **typed if explicit else {})) == []


def test_the_files_differ_only_in_stage_precision_and_offload() -> None:
    assert {file.name for file in (ROOT / "config").glob("*.json")} == set(EXPECTED)
    configs = [json.loads((ROOT / "config" / name).read_text()) for name in EXPECTED]
    scales = [config["fp16"] for config in configs if "fp16" in config]
    assert scales == [scales[0]] * 2
    for config in configs:
        for key in ("bf16", "fp16", "optimizer"):
            config.pop(key, None)
        config["zero_optimization"].pop("offload_optimizer", None)
    first, *others, stage_2 = configs
    assert others == [first] * 4
    assert stage_2.pop("zero_optimization")["stage"] == 2
    first.pop("zero_optimization")
    assert stage_2 == first


@pytest.mark.parametrize(
    "name", [name for name, (_, precision, _) in EXPECTED.items() if precision == "fp16"]
)
def test_the_loss_scale_of_fp16_starts_at_2_to_the_16th_and_follows_overflows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's own scaler with the file's values. The first overflow is forgiven (hysteresis 2)."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # there are no ranks; the first one would log
    config = DeepSpeedConfig(filled(options(name, tmp_path))).float16_config
    assert (config.enabled, config.auto_cast, config.loss_scale) == (True, False, 0), (
        "0: the scale is dynamic"
    )
    scaler = CreateLossScaler(
        dtype=torch.float16,
        static_loss_scale=config.loss_scale,
        dynamic_scaling=config.loss_scale == 0,
        dynamic_loss_args=config.dynamic_loss_scale_args(),
    )
    scales = [scaler.loss_scale]
    for overflow in (True, True, True, *[False] * 2002):
        scaler.update_scale(overflow)
        scales.append(scaler.loss_scale)
    assert scales[:4] == [2**16, 2**16, 2**15, 2**14]
    steps_up = [step - 3 for step in range(4, len(scales)) if scales[step] > scales[step - 1]]
    assert steps_up == [1001, 2001], "after a window of 1,000 steps without an overflow"
    assert (scales[-1], config.min_loss_scale) == (2**16, 1)


def test_the_timer_that_waits_for_the_device_is_off_unless_the_file_turns_it_on(tmp_path: Path) -> None:
    completed = filled(options("ds_z3_bf16_config.json", tmp_path))
    assert DeepSpeedConfig(completed).timers_config.enabled is False
    typed = {"timers": {"throughput": {"enabled": True}}, "wall_clock_breakdown": True}
    assert for_engine(typed) == typed


def test_auto_buckets_get_the_size_of_a_block_and_typed_sizes_stay() -> None:
    auto = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage": 3}
    fill_bucket_sizes(auto, 1000)
    assert auto == {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 900, "stage": 3}
    typed: dict[str, Any] = {"reduce_bucket_size": 5, "stage": 2}
    fill_bucket_sizes(typed, 1000)
    assert typed == {"reduce_bucket_size": 5, "stage": 2}


def test_the_plan_reads_the_sizes_that_deepspeed_would_use() -> None:
    zero = read_zero({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    parsed = DeepSpeedZeroConfig()
    assert (zero.bucket, zero.prefetch) == (0, parsed.prefetch_bucket_size)
    assert read_zero({"zero_optimization": {"stage": 3}}).bucket == parsed.reduce_bucket_size
