"""Plans when checkpoints are written, whether in the background, and how long training waits for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from training.consts import GIB
from training.options.intervals import LARGEST_SAVE_SHARE, default_seconds_between_saves, typed_save_seconds
from training.plan.adapter import trained_parameters
from training.plan.overhead import checkpoint_seconds

if TYPE_CHECKING:
    from training.machine.catalogue import Machine
    from training.options.settings import Settings
    from training.plan.model_shape import ModelShape

PINNED = 20e9  # device to pinned memory, PCIe 4 x16: an assumption
HOST_COPY = 5e9  # host memory to host memory, one thread: measured 4e9 to 8e9


def with_saves(
    model: ModelShape,
    machine: Machine,
    settings: Settings,
    host: dict[str, float],
    step: float,
    evaluation: float,
    steps: int,
) -> tuple[Settings, dict[str, float]]:
    """(settings with the plan's choices for checkpoints, host memory with their copies).

    Saves run in the background if `host` (`memory.host_memory` of all processes) leaves room for the copies. `step` and
    `evaluation` are seconds, `steps` the number of the run's steps.
    """
    copies = copies_gib(model, settings, min(settings.ranks, machine.count))
    background = host["training"] + copies <= machine.host_gib
    if background:
        host = host | {"training": host["training"] + copies, "of which copies of a save": copies}
    settings = replace(settings, background_saves=background)
    return replace(
        settings,
        save_seconds=seconds_between_saves(model, machine, settings, step, evaluation, steps),
        checkpoint_seconds=sum(checkpoint_seconds(model, machine, settings).values()),
    ), host


def copies_gib(model: ModelShape, settings: Settings, local_ranks: int) -> float:
    """Host GiB of the copies from which `local_ranks` ranks write a checkpoint: its bytes. Without ZeRO rank 0 has all."""
    share = local_ranks / settings.ranks if settings.zero.stage else 1.0
    return settings.checkpoint_bytes * trained_parameters(model, settings) * share / GIB


def blocked_seconds(model: ModelShape, machine: Machine, settings: Settings) -> float:
    """Seconds that training waits for one checkpoint: for the copies in host memory, or else for all of it."""
    parts = checkpoint_seconds(model, machine, settings)
    if not settings.background_saves:
        return sum(parts.values())
    on_host = machine.is_cpu or settings.zero.offload_optimizer
    shard = (
        settings.checkpoint_bytes
        * trained_parameters(model, settings)
        / (settings.ranks if settings.zero.stage else 1)
    )
    return parts["checking"] + shard / (HOST_COPY if on_host else PINNED)


def seconds_between_saves(
    model: ModelShape, machine: Machine, settings: Settings, step: float, evaluation: float, steps: int
) -> float:
    """What was typed, or a quarter of the run's steps and at most ten minutes, or longer where saving would take more
    than 5% of that.

    A save in the background must also have ended before the next one. A save between two evaluations brings another one,
    whose time counts; saves at --eval-steps bring none.
    """
    typed = typed_save_seconds(settings.options)
    written = sum(checkpoint_seconds(model, machine, settings).values())
    blocked = blocked_seconds(model, machine, settings)
    wanted = default_seconds_between_saves(steps * step)
    seconds = max(wanted, blocked / LARGEST_SAVE_SHARE, written)
    with_evaluation = min((blocked + evaluation) / LARGEST_SAVE_SHARE, settings.options.eval_steps * step)
    return typed or max(seconds, with_evaluation)
