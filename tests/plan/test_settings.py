"""Presets of the GPU families, and the settings that memory and time depend on."""

from __future__ import annotations

import json
from itertools import product

import pytest

from tests.conftest import resolved
from training.consts import ROOT
from training.errors import MachineError, OptionsError
from training.machine.catalogue import FAMILIES
from training.options.deepspeed import Zero, read_zero
from training.options.trainer_options import TrainingOptions
from training.plan.presets import preset_options, rows_and_accumulation, shipped_files
from training.plan.request import checked_settings

BF16, BF16_OFFLOAD = "config/ds_z3_bf16_config.json", "config/ds_z3_bf16_offload_config.json"


def settings(ranks: int = 8, family: str = "a100", **options):
    return resolved(TrainingOptions(local_output_dir="x", **options), ranks, family)


def test_presets_keep_the_global_batch_for_one_to_eight_devices():
    for family, batching, devices in product(FAMILIES, ("packed", "padded"), (1, 2, 4, 8)):
        chosen = preset_options(family, devices, batching)
        assert chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] * devices == 64
    assert rows_and_accumulation(64, 8) == (8, 1)
    assert rows_and_accumulation(64, 4) == (16, 1)
    assert rows_and_accumulation(64, 2, "padded") == (8, 4)
    assert rows_and_accumulation(64, 3) == (11, 2)
    assert rows_and_accumulation(64, 100) == (1, 1)


def test_presets_name_shipped_deepspeed_files_of_their_precision():
    for preset in (family for name, family in FAMILIES.items() if name != "cpu"):
        shipped = shipped_files(preset.precision)
        assert {preset.deepspeed, preset.offload} <= set(shipped)
        for file in shipped:
            config = json.loads((ROOT / file).read_text())
            assert config[preset.precision]["enabled"] is True
            assert ("offload" in file) == ("offload_optimizer" in config["zero_optimization"])
            assert f"ds_z{config['zero_optimization']['stage']}_{preset.precision}_" in file
    assert [len(shipped_files(precision)) for precision in ("bf16", "fp16", "fp32")] == [3, 2, 0]


def test_notebook_flow_and_plan_refuse_a_deepspeed_file_as_the_trainer_does(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(
        json.dumps(
            {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "fp16": {"enabled": True}}
        )
    )
    chosen = TrainingOptions(local_output_dir="x", deepspeed=str(file), bf16=True)
    with pytest.raises(OptionsError) as refused:
        checked_settings(chosen, 8, "bf16")
    for problem in (
        "zenflow",
        "leaves out train_micro_batch_size_per_gpu",
        "leaves out gradient_clipping",
        "trains in fp16",
    ):
        assert sum(problem in line and str(file) in line for line in refused.value.problems) == 1
    shipped = TrainingOptions(local_output_dir="x", deepspeed=BF16)
    assert checked_settings(shipped, 8, "bf16").zero.stage == 3


def test_an_unknown_family_and_zero_devices_are_refused():
    with pytest.raises(
        MachineError, match=r"unknown GPU family 'b200'. Known are: a100, h100, a10, v100, t4, cpu"
    ):
        preset_options("b200", 8)
    with pytest.raises(MachineError, match="--num-gpus 0: at least one device"):
        preset_options("a100", 0)


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = settings(deepspeed=BF16_OFFLOAD)
    assert (found.ranks, found.precision, found.max_tokens) == (8, "bf16", "auto")
    assert found.zero == Zero(stage=3, offload_optimizer=True, pinned=True)
    with pytest.raises(OptionsError, match="No such file"):
        settings(deepspeed="config/none.json")


def test_a_token_budget_may_be_auto_and_is_none_for_padded_rows():
    assert settings(max_tokens_per_device="auto").max_tokens == "auto"
    assert settings(max_tokens_per_device=512).max_tokens == 512
    assert settings(max_tokens_per_device="auto", batching="padded").max_tokens is None


@pytest.mark.parametrize(
    ("family", "options", "precision", "weight_bytes"),
    [
        ("a100", {"deepspeed": BF16}, "bf16", 2),
        ("cpu", {"deepspeed": BF16}, "bf16", 2),
        ("a100", {}, "bf16", 4),
        ("v100", {}, "fp16", 4),
        ("cpu", {}, "fp32", 4),
        ("a100", {"bf16": False}, "fp32", 4),
        ("a100", {"fp16": True}, "fp16", 4),
    ],
)
def test_precision_comes_from_options_then_deepspeed_file_then_gpu_family(
    family, options, precision, weight_bytes
):
    found = settings(family=family, **options)
    assert (found.precision, found.weight_bytes) == (precision, weight_bytes)


def test_missing_zero_settings_have_deepspeeds_defaults():
    buckets = {"bucket": 5e8, "prefetch": 5e7}
    assert read_zero({}) == Zero(stage=0, **buckets)
    stage_2 = {"stage": 2, "offload_optimizer": {"device": "none"}}
    assert read_zero({"zero_optimization": stage_2}) == Zero(stage=2, **buckets)
    for value in (10**400, float("nan"), float("inf")):  # refused, but by the checks of the file
        section = {"stage": value, "sub_group_size": value, "reduce_bucket_size": value}
        assert read_zero({"zero_optimization": section}) == Zero(stage=0, **buckets)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=3)
    ours = Zero(stage=3)
    assert (theirs.max_live_parameters, theirs.sub_group_size) == (ours.live_parameters, ours.sub_group)
