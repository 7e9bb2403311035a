"""Progress of a run on the console: one line an event, and a bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from training.consts import SUPERVISED
from training.files import duration


class ProgressLog(TrainerCallback):
    """Prints loss, rate, speed and time left.

    On a terminal a bar moves below the lines; in a file or a notebook's log there are only the lines,
    because a bar redrawn there is noise.
    """

    bar: tqdm

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.begin, self.first_step = 0.0, state.global_step
        terminal = sys.stderr.isatty() or os.environ.get(SUPERVISED) == "terminal"
        size = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(**size, unit="step", dynamic_ncols=True, disable=not terminal)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.begin = self.begin or time.monotonic()  # what came before the first step is no part of its time

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "eval_loss" in logs:
            write(f"{place(state)}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            write(
                f"{place(state)}  loss {logs['loss']:.4f}  rate {logs['learning_rate']:.2e}"
                f"  gradient norm {float(logs.get('grad_norm') or 0.0):.2f}"
                f"  {logs['tokens_per_second']:,.0f} tokens/s, {logs['real_token_share']:.0%} of those computed"
                f"  MFU {logs['mfu']:.0%}  {logs['peak_memory_gib']:.1f} GiB{self._speed(state)}"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.close()

    def _speed(self, state: TrainerState) -> str:
        steps = state.global_step - self.first_step
        if not steps or not self.begin:
            return ""
        seconds = (time.monotonic() - self.begin) / steps
        return f"  {seconds:.2f} s/step  {duration(seconds * (state.max_steps - state.global_step))} left"


def place(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"


def write(text: str) -> None:
    """Prints above the bar, if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
