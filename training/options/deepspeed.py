"""Reads the DeepSpeed JSON, and its settings of precision and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.consts import CONFIG
from training.errors import OptionsError


def read_json(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON. A config/NAME that is not in the working folder is the shipped file.

    Raises OptionsError if the file does not exist or holds no JSON object.
    """
    file = Path(path)
    try:
        if file.parent == Path("config") and not file.exists() and (CONFIG / file.name).exists():
            file = CONFIG / file.name
        if file.exists() and not file.is_file():  # reading a pipe may block forever
            raise OSError(0, "Is not a regular file")
        config = json.loads(file.read_text(), object_pairs_hook=_unique_keys)
    except OSError as error:
        shipped = ", ".join(str(file) for file in sorted(CONFIG.glob("*.json")))
        raise OptionsError(
            f"--deepspeed {path}: {error.strerror or error}. Available are: {shipped}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise OptionsError(f"--deepspeed {path}: broken JSON: {error}") from error
    if not isinstance(config, dict):
        raise OptionsError(f"--deepspeed {path}: expected a JSON object, found a {type(config).__name__}")
    return config


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} appears twice")
    return dict(pairs)


def enabled(config: Mapping[str, Any], precision: str) -> bool | None:
    """Whether the DeepSpeed JSON enables a precision; None if it leaves that open."""
    section = config.get(precision)
    value = section.get("enabled") if isinstance(section, dict) else None
    return value if isinstance(value, bool) else None


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the DeepSpeed configuration keeps the optimizer in host memory."""
    zero = config.get("zero_optimization")
    return isinstance(zero, dict) and bool(zero.get("offload_optimizer"))


@dataclass(frozen=True)
class Zero:
    """The memory settings of a DeepSpeed configuration. Stage 0 is training without DeepSpeed.

    `live_parameters`, `sub_group` and `bucket` count parameters; a bucket of 0 is transformers' "auto": width^2.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    pinned: bool = False
    live_parameters: float = 1e9
    sub_group: float = 1e9
    bucket: float = 0


def read_zero(config: dict[str, Any]) -> Zero:
    """The memory settings of a DeepSpeed configuration. Missing keys get DeepSpeed 0.19's defaults
    (runtime/zero/config.py)."""
    zero = config.get("zero_optimization", {})
    optimizer, parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}

    def number(key: str, default: float) -> float:
        value = zero.get(key, default)
        return default if value == "auto" else float(value)

    return Zero(
        stage=int(zero.get("stage", 0)),
        offload_optimizer=optimizer.get("device", "none") != "none",
        offload_parameters=parameters.get("device", "none") != "none",
        pinned=bool(optimizer.get("pin_memory", False)),
        live_parameters=number("stage3_max_live_parameters", 1e9),
        sub_group=number("sub_group_size", 1e9),
        bucket=number("reduce_bucket_size", 0),
    )
