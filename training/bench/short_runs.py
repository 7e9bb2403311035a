"""Settings of the GPU check's short trainings, and how many layers of GPT-J fit into the GPU by the plan."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

from training.bench.lines import NotApplicableError, Setup
from training.consts import CONFIG
from training.options.settings import Settings, resolve
from training.options.trainer_options import TrainingOptions
from training.plan.epoch import ALPACA_RESPONSE_SHARE, alpaca_lengths, epoch_load
from training.plan.memory import device_memory
from training.plan.model_shape import gptj_shape

MOST_LAYERS = 28  # of GPT-J-6B
SHARE_OF_FREE = 0.95  # of the free memory that the plan may need, because the plan may be off


def config_file(kind: str, precision: str) -> str:
    """The shipped DeepSpeed JSON of a kind, such as "z3" or "z3_offload". Raises NotApplicableError if there is none."""
    stage, *offload = kind.split("_")
    name = "_".join(["ds", stage, precision, *offload, "config.json"])
    if not (CONFIG / name).is_file():
        raise NotApplicableError(f"there is no config/{name}")
    return f"config/{name}"


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def become_the_only_rank() -> None:
    """Sets the variables with which a launcher starts one rank. Raises NotApplicableError without DeepSpeed."""
    if not has_deepspeed():
        raise NotApplicableError("the package deepspeed is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def settings_of(setup: Setup, config: str | None, whole_blocks: bool = True, **options: Any) -> Settings:
    """The settings of a training on one device, without checkpointing and splits; `config` is the DeepSpeed JSON."""
    precision: dict[str, Any] = {} if config else {setup.precision: True}
    chosen = TrainingOptions(
        local_output_dir=str(Path(setup.folder) / "steps"),
        deepspeed=config,
        per_device_train_batch_size=setup.rows,
        **precision,
        **options,
    )
    whole = whole_blocks and config is not None
    return resolve(chosen, 1, setup.precision).with_plan_choices(False, None, "packed", whole)


def planned_gib(setup: Setup, settings: Settings, layers: int) -> dict[str, float]:
    """The plan's GiB on the device, by part, for random rows of Alpaca's lengths."""
    shape = gptj_shape("random", layers, setup.width, setup.heads, setup.vocabulary)
    load = epoch_load(alpaca_lengths(), settings)
    return device_memory(shape, settings, load, ALPACA_RESPONSE_SHARE, cpu=setup.device == "cpu")


def layers_that_fit(setup: Setup, free_gib: float) -> int:
    """The most layers, up to GPT-J's, with which all lines that train fit into the free memory; at least one."""
    kinds = []
    for kind in ("z3", "z2", None):
        try:
            kinds.append(settings_of(setup, kind and config_file(kind, setup.precision)))
        except NotApplicableError:
            continue

    def fits(layers: int) -> bool:
        needs = [sum(planned_gib(setup, settings, layers).values()) for settings in kinds]
        return max(needs) <= SHARE_OF_FREE * free_gib

    return next((layers for layers in range(MOST_LAYERS, 1, -1) if fits(layers)), 1)
