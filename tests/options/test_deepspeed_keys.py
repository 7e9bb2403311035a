"""The table of DeepSpeed's keys against DeepSpeed's own classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from training.options import deepspeed_keys as keys
from training.options.deepspeed import read_zero
from training.options.deepspeed_checks import file_problems
from training.options.deepspeed_keys import FILE, ZERO, Section, canonical
from training.options.trainer_options import TrainingOptions

CLASSES = (
    (keys.ZERO, DeepSpeedZeroConfig),
    (keys.OFFLOAD_PARAM, DeepSpeedZeroOffloadParamConfig),
    (keys.OFFLOAD_OPTIMIZER, DeepSpeedZeroOffloadOptimizerConfig),
    (keys.FP16, DeepSpeedFP16Config),
    (keys.BF16, DeepSpeedBF16Config),
    (keys.COMMS_LOGGER, CommsLoggerConfig),
    (keys.MONITOR.keys, TensorBoardConfig),
    (keys.MONITOR.keys, CSVConfig),
    (keys.THROUGHPUT.keys, DeepSpeedThroughputTimerConfig),
)


def names_of(section: Section) -> set[str]:
    return {*section, *(other for key in section.values() for other in key.other_names)}


@pytest.mark.parametrize(("section", "model"), CLASSES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_table_has_every_field_and_alias_of_deepspeeds_classes_and_no_other(
    section: Section, model: Any
) -> None:
    fields = model.model_fields
    removed = set(deepspeed_config._REMOVED_ZERO_CONFIG_KEYS) if section is ZERO else set()
    assert (
        names_of(section) == {*fields, *(field.alias for field in fields.values() if field.alias)} | removed
    )
    for name, key in section.items():
        same = [other for other, field in fields.items() if {other, field.alias} & {name, *key.other_names}]
        assert len(same) <= 1 + (name == "stage3_gather_16bit_weights_on_model_save"), name


class Recorder(dict[str, Any]):
    """A DeepSpeed file that records the keys that DeepSpeed looks for."""

    def __init__(self, content: dict[str, Any], seen: set[str]):
        super().__init__(content)
        self.seen = seen

    def __copy__(self) -> Recorder:
        return Recorder(self, self.seen)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        recorder = self

        class Keys(list):
            def __contains__(self, key: object) -> bool:
                recorder.seen.add(str(key))
                return super().__contains__(key)

        return Keys(super().keys())


def test_the_table_has_every_key_that_deepspeed_looks_for() -> None:
    seen: set[str] = {"sequence_parallel_size"}  # only in a process group
    DeepSpeedConfig(Recorder({"train_batch_size": 1, "gradient_accumulation_steps": 1}, seen))
    of_data_efficiency = {
        "data_sampling",
        "data_routing",
        "seed",
    }  # it is read with the file itself as default
    assert seen - of_data_efficiency == names_of(FILE)
    assert set(vars(DeepSpeedFlopsProfilerConfig({}))) == set(keys.FLOPS_PROFILER)


VALUES = [
    None, True, False, 0, 1, 2, -1, 0.5, 1.0, 1e9, 1e14, 10**30, "auto", "8", "true", "", "cpu", "none", "nvme", "fp32", "info",
    float("nan"), float("inf"), 10**400, [], ["x"], {}, {"device": "cpu"}, {"enabled": True}, {"enabled": False},
]  # fmt: skip


def all_keys(section: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, key in section.items():
        yield from ((*path, written) for written in (name, *key.other_names))
        yield from all_keys(key.keys, (*path, name))


AUTOMATIC = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
OPTIMIZER = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}


def file_with(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A file that a run accepts, with one key changed or added."""
    file: dict[str, Any] = AUTOMATIC | {"zero_optimization": {"stage": 0}}
    if path[0] == "optimizer":
        file["optimizer"] = copy.deepcopy(OPTIMIZER)
    section = file
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return file


def test_deepspeed_accepts_every_value_that_the_table_accepts() -> None:
    options = TrainingOptions(local_output_dir="out", deepspeed="file.json")
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    accepted, refused = 0, []
    for path in all_keys(FILE):
        for value in VALUES:
            config = canonical(json.loads(json.dumps(file_with(path, value))))
            if file_problems(options, config, ranks=1):
                continue
            accepted += 1
            if config.get("gradient_clipping") == "auto":
                del config["gradient_clipping"]
            try:
                DeepSpeedConfig(config | batch)
            except Exception as error:
                refused.append((path, value, str(error)[:200]))
    assert not refused
    assert accepted > 900


def test_the_memory_settings_and_their_defaults_are_deepspeeds() -> None:
    """By either name of each key; the plan reads no others."""
    for zero in (
        {},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 0, "stage3_max_live_parameters": 5},
        {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "max_live_parameters": 7},
        {"stage": 2, "cpu_offload_param": False, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
        {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": None, "sub_group_size": 10},
        {"stage": 3, "gather_16bit_weights_on_model_save": True},
        {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True, "prefetch_bucket_size": 3},
    ):  # fmt: skip
        file = canonical({"zero_optimization": zero})
        theirs, ours = DeepSpeedZeroConfig(**zero), read_zero(file)
        optimizer, parameters = theirs.offload_optimizer, theirs.offload_param
        offloaded = optimizer is not None and optimizer.device == "cpu"
        assert (ours.stage, ours.sub_group, ours.live_parameters) == (
            theirs.stage, theirs.sub_group_size, theirs.max_live_parameters,
        )  # fmt: skip
        assert ours.offload_optimizer == offloaded
        assert ours.pinned == (offloaded and optimizer.pin_memory)
        assert ours.offload_parameters == (parameters is not None and parameters.device == "cpu")
        written = file.get("zero_optimization", {}).get("stage3_gather_16bit_weights_on_model_save", False)
        assert written == theirs.gather_16bit_weights_on_model_save


@pytest.mark.parametrize(
    "zero",
    [
        {"stage3_max_live_parameters": 1, "max_live_parameters": 1},
        {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}},
        {"stage3_gather_fp16_weights_on_model_save": True, "gather_16bit_weights_on_model_save": True},
    ],
)
def test_a_setting_by_two_names_is_refused(zero: dict[str, Any]) -> None:
    first, second = zero
    with pytest.raises(ValueError, match=f"zero_optimization.{first} and zero_optimization.{second} are the"):
        canonical({"zero_optimization": zero})
