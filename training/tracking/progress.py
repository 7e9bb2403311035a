"""Shows progress on the console: one line per event, and a progress bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from training.consts import SUPERVISED
from training.errors import printable
from training.files import duration
from training.storage.metrics import losses_by_source


class ProgressLog(TrainerCallback):
    """Prints loss, learning rate, speed and time left, with a progress bar on a terminal.

    Files and notebook logs get only the lines, because a redrawn bar would fill them.
    """

    bar: tqdm

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.start, self.first_step = 0.0, state.global_step
        terminal = sys.stderr.isatty() or os.environ.get(SUPERVISED) == "terminal"
        size = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(**size, unit="step", dynamic_ncols=True, disable=not terminal)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.start = self.start or time.monotonic()  # time before the first step is not counted

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "eval_loss" in logs:
            print_line(f"{step_label(state)}  held-out loss {logs['eval_loss']:.4f}{of_sources(logs)}")
        elif "loss" in logs:
            print_line(
                f"{step_label(state)}  loss {logs['loss']:.4f}  rate {logs['learning_rate']:.2e}"
                f"  gradient norm {float(logs.get('grad_norm') or 0.0):.2f}"
                f"  {logs['tokens_per_second']:,.0f} tokens/s, {logs['real_token_share']:.0%} of computed tokens"
                f"  MFU {logs['mfu']:.0%}  {logs['peak_memory_gib']:.1f} GiB{self._speed(state)}"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.close()

    def _speed(self, state: TrainerState) -> str:
        steps = state.global_step - self.first_step
        if not steps or not self.start:
            return ""
        seconds = (time.monotonic() - self.start) / steps
        return f"  {seconds:.2f} s/step  {duration(seconds * (state.max_steps - state.global_step))} left"


def of_sources(logs: dict[str, Any]) -> str:
    """The held-out losses of several sources: "  alpaca 1.2345, dolly 1.6789"; "" for a single source."""
    losses = losses_by_source(logs)
    return "  " + ", ".join(f"{label} {loss:.4f}" for label, loss in losses.items()) if losses else ""


def step_label(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"


def print_line(text: str) -> None:
    """Prints above the progress bar, if any."""
    tqdm.write(printable(text), file=sys.stdout)
    sys.stdout.flush()
