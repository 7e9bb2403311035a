"""Progress of a run on rank 0: one line an event, and a bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.consts import SUPERVISED
from training.files import duration


class ProgressLog(TrainerCallback):
    """Loss, rate, speed and time left, on rank 0 alone.

    On a terminal a bar moves below the lines; in a file or a notebook's log there are only the lines,
    because a bar redrawn there is noise.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.begin = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin, self.first_step = 0.0, state.global_step
        if state.is_world_process_zero and (sys.stderr.isatty() or os.environ.get(SUPERVISED) == "terminal"):
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin = self.begin or time.monotonic()  # what came before the first step is no part of its time

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            write(f"{place(state)}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            write(
                f"{place(state)}  loss {logs['loss']:.4f}  rate {logs.get('learning_rate', 0.0):.2e}"
                f"  gradient norm {float(logs.get('grad_norm') or 0.0):.2f}{self._figures(logs)}{self._speed(state)}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _figures(self, logs: dict[str, float]) -> str:
        if "tokens_per_second" not in logs:
            return ""
        mfu = f"  MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
        return (
            f"  {logs['tokens_per_second']:,.0f} tokens/s, {logs['real_token_share']:.0%} of those computed"
            f"{mfu}  {logs['peak_memory_gib']:.1f} GiB"
        )

    def _speed(self, state: TrainerState) -> str:
        steps = state.global_step - self.first_step
        if not steps or not self.begin:
            return ""
        seconds = (time.monotonic() - self.begin) / steps
        left = round(seconds * (state.max_steps - state.global_step))
        return f"  {seconds:.2f} s/step  {duration(left)} left"


def place(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"


def write(text: str) -> None:
    """Prints above the bar, if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
