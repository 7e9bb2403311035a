"""Adding a GPU family takes one edit in one file, and an unknown family is refused with a message."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.trees import edited_copy, run_in
from training.errors import MachineError
from training.machine.catalogue import FAMILIES, Family, family_of, find_family, find_machine
from training.options.trainer_options import TrainingOptions
from training.plan.presets import preset_options
from training.plan.request import plan_options

FAMILY = '    "v100": Family('
GPU = '    "V100-32GB": Gpu('
MACHINE = '        _machine("8xA100-40GB"'


def tree_with(folder: Path, family: str) -> Path:
    """A copy of the repository with a machine 8xB300, whose GPUs belong to the new family of the entry `family`."""
    return edited_copy(
        folder,
        "training/machine/catalogue.py",
        (FAMILY, f"{family}{FAMILY}"),
        (GPU, f'    "B300": Gpu("b300", 268.0, 2250e12, "nvlink5", "B300"),\n{GPU}'),
        (MACHINE, f'        _machine("8xB300", 8, "B300", 2048, 30000),\n{MACHINE}'),
    )


def test_a_new_family_with_a_gpu_and_a_machine_can_be_planned(tmp_path: Path) -> None:
    entry = '    "b300": Family("bf16", _BF16, _BF16_OFFLOAD, 0.15),\n'
    tree = tree_with(tmp_path, entry)
    done = run_in(tree, "training.plan", "--machine", "8xB300", "--json")
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)
    assert answer["fits"] is True
    assert (answer["gpu"], answer["num_gpus"], answer["precision"]) == ("B300", 8, "bf16")
    assert "--deepspeed config/ds_z3_bf16_config.json" in answer["command"]
    assert 0 < answer["hours"]["expected"] < 1
    assert "8xB300" in run_in(tree, "training.plan", "--help").stdout


def test_a_gpu_of_an_unknown_family_is_refused_and_known_families_are_listed(tmp_path: Path) -> None:
    done = run_in(tree_with(tmp_path, ""), "training.plan", "--machine", "8xB300")
    assert done.returncode == 2
    assert "unknown GPU family 'b300'. Known are: a100, h100, a10, v100, t4, cpu" in done.stdout
    assert "Traceback" not in done.stdout
    assert run_in(tmp_path, "training.plan", "--machine", "8xA100-40GB").returncode == 0, (
        "other machines still work"
    )


def test_every_function_that_takes_a_family_refuses_an_unknown_one() -> None:
    machine = replace(find_machine("8xH100"), family="b300")
    options = TrainingOptions(local_output_dir="OUTPUT", **preset_options("h100", 8))
    for call in (
        lambda: find_family("b300"),
        lambda: preset_options("b300", 8),
        lambda: plan_options(options, 8, machine),
    ):
        with pytest.raises(MachineError, match=r"unknown GPU family 'b300'\. Known are: a100, h100"):
            call()


def test_every_field_of_a_family_is_required() -> None:
    facts = {field.name: getattr(FAMILIES["a100"], field.name) for field in fields(Family)}
    for missing in facts:
        with pytest.raises(TypeError, match=missing):
            Family(**{name: fact for name, fact in facts.items() if name != missing})


def test_a_device_gets_a_family_with_a_precision_it_supports() -> None:
    assert family_of("NVIDIA A100-SXM4-40GB", has_bf16=True) == "a100"
    assert family_of("NVIDIA A100-SXM4-40GB", has_bf16=False) == "t4", "the A100 recipe needs bf16"
