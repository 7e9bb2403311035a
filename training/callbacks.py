"""What is told while a run trains: one line an event, a progress bar on a terminal, and metrics.jsonl for programs."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from training import metrics
from training.consts import IGNORE_INDEX
from training.supervisor import SUPERVISED

logger = logging.getLogger(__name__)


class Curves(TensorBoardCallback):
    """TensorBoard's figures and texts. A disk that does not take them ends the curves, and not the training."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.given_up = folder, False
        try:
            super().__init__(SummaryWriter(log_dir=str(folder)))
        except OSError as error:
            self._give_up(error)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_end, *args, **kwargs)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self._try(lambda: self.tb_writer.add_text(tag, text, step))

    def _try(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.given_up:
            return
        try:
            write(*args, **kwargs)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.given_up = True
        logger.warning("%s: no more curves for TensorBoard (%s); training goes on", self.folder, error)


class StepCounter:
    """What this rank computed since the last line of the log, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.begin = time.perf_counter()
        self.started = False

    def add(self, batch: dict[str, torch.Tensor]) -> None:
        """Counts a batch: real tokens, computed tokens, labels, and the squared lengths of its rows.

        The first one starts the clock: before it the run was loading, measuring and answering.
        """
        if not self.started:
            self.started, self.begin = True, time.perf_counter()
        ids = batch["input_ids"]
        if "position_ids" in batch:  # packed: the odd numbers up to 2n - 1 add up to n squared
            real = torch.tensor(ids.numel(), device=ids.device)
            squares = (2 * batch["position_ids"] + 1).sum()
        else:
            lengths = batch["attention_mask"].sum(dim=1)
            real, squares = lengths.sum(), (lengths**2).sum()
        counts = torch.stack(
            [real, torch.tensor(ids.numel(), device=ids.device), count_labels(batch), squares]
        )
        self.sums = counts if self.sums is None else self.sums + counts

    def skip(self, seconds: float) -> None:
        """Leaves time out of the speed: that of an evaluation or a save."""
        self.begin += seconds

    def take(self) -> tuple[torch.Tensor, float]:
        """(the four sums `(4,)` int64, seconds) since the last call."""
        now = time.perf_counter()
        sums, seconds = self.sums, now - self.begin
        self.sums, self.begin = None, now
        return (torch.zeros(4, dtype=torch.int64) if sums is None else sums), seconds


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Response tokens that a batch has a loss on, an int64 scalar."""
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (labels != IGNORE_INDEX).sum()


def peak_memory_gib() -> float:
    """The most memory that this process held so far: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on a Mac
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


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


class MetricsLog(TrainerCallback):
    """Writes what is logged into metrics.jsonl, on rank 0 alone.

    Args:
        seconds: of training so far, those before a resume included.
    """

    def __init__(self, file: Path, seconds: Callable[[], float]) -> None:
        self.file = file
        self.seconds = seconds
        self.written: set[tuple[int, bool]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A held-out loss that was measured at a resume is in no checkpoint, and is measured at the next resume again.
        self.written = {(entry["step"], "eval_loss" in entry) for entry in metrics.read(self.file)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not logs.keys() & {"loss", "eval_loss"}:
            return
        held_out = "eval_loss" in logs
        if (state.global_step, held_out) in self.written:
            return
        self.written.add((state.global_step, held_out))
        figures = {"eval_loss": logs["eval_loss"]} if held_out else logs
        about = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0,
                 "seconds": self.seconds()}  # fmt: skip
        metrics.append(self.file, about | {name: value for name, value in figures.items() if name != "epoch"})


def place(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"


def write(text: str) -> None:
    """Prints above the bar, if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
