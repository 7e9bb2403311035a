"""Every key of a DeepSpeed file: its names, the values that a run can use, and why it refuses the others.

The names and limits are those of DeepSpeed 0.19.8 (its runtime/config.py and runtime/zero/config.py). A test compares
this table with DeepSpeed's own classes. Imports no torch.
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

Section = dict[str, "Key"]


@dataclass(frozen=True)
class Key:
    """A key of a DeepSpeed file.

    Attributes:
        kind: type of the value; "unused": the run needs the key at `only`, or off, and says why.
        least: smallest number.
        most: largest number.
        auto: transformers or accelerate replaces "auto". They fail on any other "auto" after the model is loaded.
        keys: keys of a section.
        other_names: names that DeepSpeed takes for the same key.
        choices: the words that can be used.
        only: the one value of an unused key that changes nothing.
        reason: why the other values are refused.
    """

    kind: Literal["switch", "whole", "number", "word", "list", "section", "unused", "any"]
    least: float = -math.inf
    most: float = math.inf
    auto: bool = False
    keys: Section = field(default_factory=dict)
    other_names: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    only: Any = None
    reason: str = ""

    def changes_nothing(self, value: Any) -> bool:
        """Whether an unused key can be left out of the file as well."""
        return self.kind == "unused" and (_is_off(value) if self.only is None else _equal(value, self.only))

    @property
    def expected(self) -> str:
        """The values that can be used, in words."""
        limits = f" from {self.least:g}" if self.least > -math.inf else ""
        limits += f" to {self.most:g}" if self.most < math.inf else ""
        words = {
            "switch": "true, false" if self.auto else "true or false",
            "whole": f"a whole number{limits}",
            "number": f"a number{limits}",
            "word": " or ".join(map(repr, self.choices)) or "a text",
            "list": "a list [...]",
            "section": "an object {...}",
        }[self.kind]
        return words + (' or "auto"' if self.auto else "")

    def accepts(self, value: Any) -> bool:
        """Whether the value has the key's type and is within its limits."""
        if self.auto and _equal(value, "auto"):
            return True
        if self.kind in ("whole", "number"):
            number = is_number(value)
            whole = number and (self.kind == "number" or value == int(value))
            return whole and self.least <= value <= self.most
        if self.kind == "word":
            return isinstance(value, str) and (not self.choices or value in self.choices)
        return isinstance(value, {"switch": bool, "list": list, "section": dict}.get(self.kind, object))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. JSON also has integers that are too large for a float."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= sys.float_info.max


def _equal(value: Any, other: Any) -> bool:
    """Equality that tells true from 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _is_off(value: Any) -> bool:
    """Whether a setting changes nothing: null, false, 0, "none", or a section that is not enabled."""
    if isinstance(value, dict):
        return value.get("enabled") is False or all(map(_is_off, value.values()))
    return value in (None, False, 0, "", "none", [])


def _switch(*other_names: str, auto: bool = False) -> Key:
    return Key("switch", auto=auto, other_names=other_names)


def _whole(least: int = 0, *other_names: str, auto: bool = False) -> Key:
    return Key("whole", least=least, auto=auto, other_names=other_names)


def _section(keys: Section, *other_names: str) -> Key:
    return Key("section", keys=keys, other_names=other_names)


def _unused(reason: str, only: Any = None) -> Key:
    return Key("unused", only=only, reason=reason)


TEXT, LIST, NUMBER = Key("word"), Key("list"), Key("number", least=0)
MONITOR = _section({"enabled": _switch(), "output_path": TEXT, "job_name": TEXT})
NO_TRACKER = (
    "the figures of a run are in its metrics.jsonl, in runs/ for TensorBoard, and where --report-to says"
)
NO_NVME = "nothing is offloaded to NVMe"
DROPPED = "DeepSpeed no longer has it"
QUANTISED = "the run would train with quantised numbers"
NO_DTYPE = "the plan counts the bytes of bf16 or fp16 with float32 master weights"

OFFLOAD: Section = {
    "device": Key("word", choices=("cpu", "none"), reason="the plan cannot size an offload to NVMe"),
    "nvme_path": TEXT,
    "buffer_count": _whole(),
    "pin_memory": _switch(),
}
OFFLOAD_PARAM: Section = OFFLOAD | {"buffer_size": _whole(), "max_in_cpu": _whole()}
OFFLOAD_OPTIMIZER: Section = OFFLOAD | {
    "pipeline_read": _unused(NO_NVME),
    "pipeline_write": _unused(NO_NVME),
    "fast_init": _unused(NO_NVME),
    "ratio": _unused("the plan counts the whole optimizer in host memory", only=1),
    "super_offload": _unused("the plan does not know it"),
    "cpuadam_cores_perc": Key("number", least=0, most=1),
}
# DeepSpeed replaces these switches by a section with "device": "cpu".
OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
ZERO: Section = {
    "stage": Key("any"),  # deepspeed_checks.py says which ones
    "contiguous_gradients": _switch(),
    "reduce_scatter": _switch(),
    "reduce_bucket_size": _whole(1, auto=True),
    "use_multi_rank_bucket_allreduce": _switch(),
    "allgather_partitions": _switch(),
    "allgather_bucket_size": _whole(),
    "overlap_comm": _switch(),
    "compute_grad_norm": _unused("gradients are clipped by their norm", only=True),
    "load_from_fp32_weights": _unused("a resumed run would start from rounded weights", only=True),
    "elastic_checkpoint": _unused("a resume on another number of ranks converts the checkpoint itself"),
    "offload_param": _section(OFFLOAD_PARAM),
    "offload_optimizer": _section(OFFLOAD_OPTIMIZER),
    "zenflow": _unused("it updates some weights later than the others"),
    "sub_group_size": _whole(),
    "cpu_offload_use_pin_memory": _unused('DeepSpeed ignores it. Write "pin_memory" into offload_optimizer'),
    "stage3_prefetch_bucket_size": _whole(0, "prefetch_bucket_size", auto=True),
    "stage3_param_persistence_threshold": _whole(0, "param_persistence_threshold", auto=True),
    "stage3_model_persistence_threshold": _whole(0, "model_persistence_threshold"),
    "stage3_max_live_parameters": _whole(0, "max_live_parameters"),
    "stage3_max_reuse_distance": _whole(0, "max_reuse_distance"),
    "stage3_gather_16bit_weights_on_model_save": _switch(
        "gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save", auto=True
    ),
    "stage3_module_granularity_threshold": _whole(0, "module_granularity_threshold"),
    "stage3_use_all_reduce_for_fetch_params": _switch("use_all_reduce_for_fetch_params"),
    "stage3_allgather_sequential": _switch("allgather_sequential"),
    "ignore_unused_parameters": _switch(),
    "legacy_stage1": _unused("DeepSpeed will drop it"),
    "round_robin_gradients": _switch(),
    "parameter_alignment": _unused("the plan does not count its padding"),
    "zero_hpz_partition_size": _unused("the plan does not count the second copy of the weights", only=1),
    "zero_quantized_weights": _unused(QUANTISED),
    "zero_quantized_nontrainable_weights": _unused(QUANTISED),
    "zero_quantized_gradients": _unused(QUANTISED),
    "memory_efficient_linear": _switch(),
    "pipeline_loading_checkpoint": _unused("the trainer loads its checkpoints in one way"),
    "override_module_apply": _unused("the trainer loads the model module by module", only=True),
    "log_trace_cache_warnings": _switch(),
    "enable_sanity_checks": _switch(),
    "save_muon_momentum_buffer_in_memory": _unused("the optimizer is AdamW"),
    "leaf_module": _unused("the trainer chooses the leaf modules: the model's blocks"),
    "mics_shard_size": _unused(DROPPED, only=-1),
    "mics_hierarchical_params_gather": _unused(DROPPED),
    "zeropp_loco_param": _unused(DROPPED),
    **{name: _switch() for name in OLD_OFFLOADS},
}
FP16: Section = {
    "enabled": _switch(auto=True),
    "auto_cast": _switch(),
    "loss_scale": NUMBER,
    "initial_scale_power": Key("whole", least=0, most=64),
    "loss_scale_window": _whole(1),
    "hysteresis": _whole(),
    "consecutive_hysteresis": _switch(),
    "min_loss_scale": _whole(1),
    "fp16_master_weights_and_grads": _unused(NO_DTYPE),
}
BF16: Section = {
    "enabled": _switch(auto=True),
    "immediate_grad_update": _switch(),
    "check_grad_overflow": _switch(),
    "bf16_master_weights_and_grads": _unused(NO_DTYPE),
    "bf16_optimizer_states": _unused(NO_DTYPE),
}
ADAMW: Section = {
    "lr": Key("any", auto=True),  # deepspeed_checks.py compares these four with the options
    "betas": Key("any", auto=True),
    "eps": Key("any", auto=True),
    "weight_decay": Key("any", auto=True),
    "torch_adam": _switch(),
    "adam_w_mode": _unused("the optimizer is AdamW", only=True),
}
OPTIMIZER: Section = {
    "type": TEXT,
    "params": _section(ADAMW),
    "legacy_fusion": _unused("it fuses the moments of LAMB"),
}
FLOPS_PROFILER: Section = {
    "enabled": _switch(),
    "recompute_fwd_factor": NUMBER,
    "profile_step": _whole(1),
    "module_depth": _whole(-1),
    "top_modules": _whole(1),
    "detailed": _switch(),
    "output_file": TEXT,
}
COMMS_LOGGER: Section = {name: _switch() for name in ("enabled", "prof_all", "verbose", "debug")} | {
    "prof_ops": LIST
}
THROUGHPUT = _section({"enabled": _switch(), "synchronized": _switch()})
BATCH = Key("any", auto=True)  # deepspeed_checks.py compares these with the options
FILE: Section = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": BATCH,
    "gradient_clipping": BATCH,
    "managed_gradient_accumulation": _unused("DeepSpeed accumulates the gradients", only=True),
    "zero_optimization": _section(ZERO),
    "bf16": _section(BF16, "bfloat16"),
    "fp16": _section(FP16),
    "optimizer": _section(OPTIMIZER),
    "scheduler": Key("any"),  # deepspeed_checks.py refuses it with the names of the options
    "zero_allow_untested_optimizer": _switch(),
    "zero_force_ds_cpu_optimizer": _switch(),
    "communication_data_type": Key("word", choices=("fp32", "fp16", "bf16")),
    "steps_per_print": Key("number", least=1),
    "wall_clock_breakdown": _switch(),
    "memory_breakdown": _switch(),
    "dump_state": _switch(),
    "disable_python_gc": _switch(),
    "log_level": Key("word", choices=("debug", "info", "warning", "error", "critical")),
    "vocabulary_size": _whole(),
    "flops_profiler": _section(FLOPS_PROFILER),
    "comms_logger": _section(COMMS_LOGGER),
    "timers": _section({"throughput": THROUGHPUT}),
    "tensorboard": MONITOR,
    "csv_monitor": MONITOR,
    "wandb": _unused(NO_TRACKER),
    "comet": _unused(NO_TRACKER),
    "activation_checkpointing": _unused("only --gradient-checkpointing recomputes activations"),
    "gradient_allreduce_op": _unused("the gradient of a step is a mean", only="mean"),
    "prescale_gradients": _unused("the gradient of a step is divided once, after the sum"),
    "gradient_predivide_factor": _unused("the gradient of a step is divided once, after the sum", only=1),
    "torch_autocast": _unused("bf16 or fp16 decides the precision"),
    "data_types": _unused(NO_DTYPE),
    "seq_parallel_communication_data_type": _unused("sequences are not split over ranks"),
    "sequence_parallel_size": _unused("sequences are not split over ranks", only=1),
    "tensor_parallel": _unused("layers are not split over ranks"),
    "expert_parallel": _unused("experts are not split over ranks"),
    "use_data_before_expert_parallelism": _unused("experts are not split over ranks"),
    "pipeline": _unused("layers are not spread over ranks"),
    "aio": _unused(NO_NVME),
    "autotuning": _unused("python -m training.plan chooses the batch"),
    "checkpoint": _unused("the trainer writes and converts the checkpoints"),
    "datastates_ckpt": _unused("the trainer writes and converts the checkpoints"),
    "compile": _unused("the trainer does not compile the model"),
    "data_efficiency": _unused("the trainer orders the rows"),
    "dataloader_drop_last": _unused("the trainer deals every row"),
    "disable_allgather": _unused("ranks must exchange their weights"),
    "hybrid_engine": _unused("the run only trains"),
    "weight_quantization": _unused(QUANTISED),
} | {
    name: _unused(DROPPED)
    for name in (
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    )
}


def canonical(config: Mapping[str, Any], keys: Section = FILE, path: str = "") -> dict[str, Any]:
    """The content of a file with each key by its first name in this table, without nulls and what changes nothing.

    transformers, accelerate and the plan read only these names. Raises ValueError if a key is set by two names.
    """
    first_names = {other: name for name, key in keys.items() for other in key.other_names}
    result: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for written, value in config.items():
        name = first_names.get(written, written)
        if key := keys.get(name):
            if value is None or key.changes_nothing(value):
                continue
            if key.keys and isinstance(value, dict):
                value = canonical(value, key.keys, f"{path}{name}.")
        if keys is ZERO and name in OLD_OFFLOADS and isinstance(value, bool):
            if not value:
                continue
            name, value = OLD_OFFLOADS[name], {"device": "cpu"}
        if name in result:
            raise ValueError(f"{path}{sources[name]} and {path}{written} are the same setting. Give only one")
        result[name], sources[name] = value, written
    return result


def key_problems(config: Mapping[str, Any], keys: Section = FILE, path: str = "") -> Iterator[str]:
    """Keys of `canonical` content that are unknown, have the wrong type or that a run cannot use."""
    for name, value in config.items():
        key, shown = keys.get(name), f"sets {path}{name} {reprlib.repr(value)}"
        if key is None:
            names = [*keys, *(other for key in keys.values() for other in key.other_names)]
            close = get_close_matches(name, names, n=1)
            advice = f"Did you mean {close[0]}" if close else "Remove it"
            yield f"sets {path}{name}, which DeepSpeed would ignore or refuse. {advice}"
        elif key.kind == "unused":
            expected = f", expected {json.dumps(key.only)}" if key.only is not None else ""
            yield f"{shown}{expected}: {key.reason}. Remove it"
        elif not key.accepts(value):
            yield f"{shown}, expected {key.expected}" + (f": {key.reason}" if key.reason else "")
        elif key.keys and isinstance(value, dict):
            yield from key_problems(value, key.keys, f"{path}{name}.")
