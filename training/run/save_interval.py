"""Turns a time between checkpoints into steps, once the first steps were timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.files import duration
from training.options.intervals import default_seconds_between_saves, fixed_save_steps, steps_between_saves
from training.options.trainer_options import TrainingOptions
from training.ranks import broadcast

logger = logging.getLogger(__name__)

# The first steps allocate memory and compile kernels.
UNTIMED_STEPS, TIMED_STEPS = 2, 8


def save_steps(options: TrainingOptions, former: dict[str, Any] | None) -> int | None:
    """The steps between checkpoints: typed, or those of the `former` run that is resumed. None: a time decides.

    A run from before --save-every has them among its options.
    """
    fixed = fixed_save_steps(options)
    if fixed is not None or former is None:
        return fixed
    if options.save_every != former["options"].get("save_every"):
        return None
    steps = (former.get("decided") or {}).get("save_steps") or former["options"].get("save_steps")
    return steps if isinstance(steps, int) else None


class SaveInterval(TrainerCallback):
    """Times the first steps of a run, and sets the steps between checkpoints from their mean.

    Evaluations, log lines and saves do not count. Rank 0 decides, so all ranks save at the same steps.

    Args:
        seconds: the time between checkpoints.
        is_default: it was not typed. A machine that is slower than the plan then saves as often in a run, not more often.
        decided: called on every rank with the number of steps.
    """

    def __init__(self, seconds: float, is_default: bool, decided: Callable[[int], None]) -> None:
        self.seconds = seconds
        self.is_default = is_default
        self.decided = decided
        self.times: list[float] = []
        self.begin = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.times.append(time.perf_counter() - self.begin)
        if len(self.times) != UNTIMED_STEPS + TIMED_STEPS:
            return
        mean = fmean(self.times[UNTIMED_STEPS:])
        seconds = self.seconds
        if self.is_default:
            seconds = max(seconds, default_seconds_between_saves(state.max_steps * mean))
        steps = broadcast(steps_between_saves(seconds, mean, int(args.eval_steps or 1)))
        args.save_steps = state.save_steps = steps
        logger.info("a checkpoint every %s steps, about %s", f"{steps:,}", duration(steps * mean))
        self.decided(steps)
