"""Figures of a run written as it trains: TensorBoard and metrics.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from training.storage import metrics

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
