"""Steps and times between checkpoints and between sample answers, from the options."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from training.errors import OptionsError

if TYPE_CHECKING:
    from training.options.trainer_options import TrainingOptions

STEPS_BETWEEN_SAVES = 200  # with --final-model best, which no clock may influence
SECONDS_BETWEEN_SAVES = 600.0  # at most, if nothing is typed and saving is cheap
LARGEST_SAVE_SHARE = 0.05  # of the run that saving may take, if nothing is typed


def fixed_save_steps(options: TrainingOptions) -> int | None:
    """Steps between saves; None if a time decides."""
    return options.save_steps or (STEPS_BETWEEN_SAVES if options.final_model == "best" else None)


def default_seconds_between_saves(run_seconds: float) -> float:
    """A quarter of a run whose steps take `run_seconds`, and at most ten minutes."""
    return min(SECONDS_BETWEEN_SAVES, run_seconds / 4)


def typed_save_seconds(options: TrainingOptions) -> float | None:
    """`--save-every` in seconds. Raises OptionsError if it is no time."""
    if options.save_every is None:
        return None
    time = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(s|min|h)", options.save_every)
    seconds = float(time[1]) * {"s": 1, "min": 60, "h": 3600}[time[2]] if time else 0.0
    if not seconds:
        raise OptionsError(f"--save-every {options.save_every}: expected a time such as 90s, 10min or 1h")
    return seconds


def steps_between_saves(seconds: float, step_seconds: float, eval_steps: int) -> int:
    """A time between saves in steps. A save brings an evaluation, so above --eval-steps it is a multiple of them."""
    steps = max(1, round(seconds / step_seconds))
    return steps if steps <= eval_steps else eval_steps * round(steps / eval_steps)


def steps_between_samples(options: TrainingOptions, steps_per_epoch: int) -> Fraction:
    """`--sample-every` in steps, possibly fractional. Raises OptionsError if it is neither steps nor epochs."""
    every = options.sample_every or "1epoch"
    epochs = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}) ?epochs?", every)
    steps = re.fullmatch(r"[0-9]{1,9}", every)
    number = Fraction(epochs.group(1) if epochs else every) if epochs or steps else Fraction(0)
    if not number:
        raise OptionsError(
            f"--sample-every {every}: expected steps, such as 100, or epochs, such as 1epoch or 0.5epochs"
        )
    return number * steps_per_epoch if epochs else number
