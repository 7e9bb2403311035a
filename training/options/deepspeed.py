"""Reads the DeepSpeed JSON, and its settings of precision and memory."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.consts import CONFIG
from training.errors import OptionsError
from training.options.deepspeed_keys import canonical, is_number


def read_json(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON, with each key by one name (`canonical`).

    A config/NAME that is not in the working folder is the shipped file.

    Raises OptionsError if the file does not exist, holds no JSON object, or sets a key by two names.
    """
    file = Path(path)
    try:
        if file.parent == Path("config") and not file.exists() and (CONFIG / file.name).exists():
            file = CONFIG / file.name
        if file.exists() and not file.is_file():  # reading a pipe may block forever
            raise OSError(0, "Is not a regular file")
        # Windows' editors write a byte order mark.
        config = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except OSError as error:
        shipped = ", ".join(str(file) for file in sorted(CONFIG.glob("*.json")))
        raise OptionsError(
            f"--deepspeed {path}: {error.strerror or error}. Available are: {shipped}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise OptionsError(f"--deepspeed {path}: broken JSON: {error}") from error
    if not isinstance(config, dict):
        raise OptionsError(f"--deepspeed {path}: expected a JSON object, found a {type(config).__name__}")
    try:
        return canonical(config)
    except ValueError as error:
        raise OptionsError(f"--deepspeed {path}: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} appears twice")
    return dict(pairs)


def enabled(config: Mapping[str, Any], precision: str) -> bool | None:
    """Whether the DeepSpeed JSON enables a precision; None if it leaves that open."""
    section = config.get(precision)
    value = section.get("enabled") if isinstance(section, dict) else None
    return value if isinstance(value, bool) else None


def offloads(zero: Mapping[str, Any], section: str) -> bool:
    """Whether the file's zero_optimization keeps something in host memory; `section` is offload_optimizer or _param."""
    value = zero.get(section)
    return isinstance(value, dict) and value.get("device", "none") != "none"


# Parameters of the largest block that is handled as a whole: also DeepSpeed's own size of a bucket of gradients. A rank
# holds such a block in transit four times, in 16 bit 4 GB. The experts of a large mixture are more.
LARGEST_BUCKET = 5 * 10**8


def for_engine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the DeepSpeed JSON with what the trainer adds to it.

    DeepSpeed's throughput timer waits for the device twice a step, and prints nothing that the trainer does not log.
    """
    return {"timers": {"throughput": {"enabled": False}}} | copy.deepcopy(dict(config))


def bucket_sizes(block: int) -> dict[str, int]:
    """Parameters in DeepSpeed's buckets for a model whose blocks have `block` parameters, by key of zero_optimization.

    A bucket of a block's size reduces its gradients in one call. DeepSpeed prefetches until the bucket is full and
    exceeds it by one parameter, so nine tenths of a block prefetch one block. transformers' "auto" is width^2, a twelfth
    of a block of GPT-J.
    """
    return {"reduce_bucket_size": block, "stage3_prefetch_bucket_size": int(0.9 * block)}


def fill_bucket_sizes(zero: dict[str, Any], block: int) -> None:
    """Replaces "auto" sizes of buckets in a zero_optimization section, in place. Sizes that the user typed stay."""
    for key, size in bucket_sizes(block).items():
        if zero.get(key) == "auto":
            zero[key] = size


@dataclass(frozen=True)
class Zero:
    """The memory settings of a DeepSpeed configuration. Stage 0 is training without DeepSpeed.

    `live_parameters`, `sub_group`, `bucket` (of gradients) and `prefetch` count parameters; a bucket of 0 is "auto":
    `bucket_sizes` if blocks are handled as a whole, otherwise transformers' width^2 and nine tenths of it. With
    `all_reduce` stages 1 and 2 send each reduced gradient to all ranks, not only to the one that keeps it.
    `leaf_threshold`: DeepSpeed chooses leaf modules by the file's stage3_module_granularity_threshold.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    pinned: bool = False
    live_parameters: float = 1e9
    sub_group: float = 1e9
    bucket: float = 0
    all_reduce: bool = True
    prefetch: float = 0
    leaf_threshold: bool = False


def read_zero(config: Mapping[str, Any]) -> Zero:
    """The memory settings of a DeepSpeed configuration. Missing keys and wrong values get DeepSpeed 0.19's defaults."""
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    offloaded = offloads(zero, "offload_optimizer")

    def number(key: str, default: float) -> float:
        value = zero.get(key, default)
        return float(value) if is_number(value) else default

    def bucket(key: str, default: float) -> float:
        return 0.0 if zero.get(key) == "auto" else number(key, default)

    return Zero(
        stage=int(number("stage", 0)),
        offload_optimizer=offloaded,
        offload_parameters=offloads(zero, "offload_param"),
        pinned=offloaded and zero["offload_optimizer"].get("pin_memory", True) is True,
        live_parameters=number("stage3_max_live_parameters", 1e9),
        sub_group=number("sub_group_size", 1e9),
        bucket=bucket("reduce_bucket_size", 5e8),
        prefetch=bucket("stage3_prefetch_bucket_size", 5e7),
        leaf_threshold=number("stage3_module_granularity_threshold", 0) > 0,
        all_reduce=zero.get("use_multi_rank_bucket_allreduce", True) is not False,
    )
