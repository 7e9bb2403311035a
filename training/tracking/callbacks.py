"""The trackers of a run: console, TensorBoard, metrics.jsonl and MLflow. A new tracker is one edit of this file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from training.consts import METRICS_FILE
from training.options.settings import Settings
from training.ranks import is_main_process
from training.storage import metrics
from training.tracking.mlflow import mlflow_log
from training.tracking.progress import ProgressLog

logger = logging.getLogger(__name__)


@contextmanager
def trackers(
    settings: Settings, record: dict[str, Any], seconds: Callable[[], float]
) -> Iterator[list[TrainerCallback]]:
    """The callbacks that write the figures of the training in the `with`; rank 0 alone has any.

    A new tracker is one more callback of transformers in the list, such as its WandbCallback. One that must be closed,
    also where the training fails, is entered as MLflow's is.

    Args:
        record: the run's record (run.json), with what the plan has decided.
        seconds: of training so far, those before a resume included.
    """
    if not is_main_process():
        yield []
        return
    output = settings.output
    with ExitStack() as stack:
        callbacks = [ProgressLog(), Curves(output / "runs"), MetricsLog(output / METRICS_FILE, seconds)]
        if settings.options.logs_to_mlflow:
            callbacks.append(stack.enter_context(mlflow_log(record, output.name)))
        yield callbacks


class Curves(TensorBoardCallback):
    """TensorBoard's figures and texts. A disk that does not take them ends the curves, and not the training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir, self.given_up = str(folder), False

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
            self.given_up = True
            where = self.logging_dir
            logger.warning("%s: no more curves for TensorBoard (%s); training goes on", where, error)


class MetricsLog(TrainerCallback):
    """Writes what is logged into metrics.jsonl.

    Args:
        seconds: of training so far, those before a resume included.
    """

    def __init__(self, file: Path, seconds: Callable[[], float]) -> None:
        self.file = file
        self.seconds = seconds
        self.written: set[tuple[int, bool]] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # A held-out loss that was measured at a resume is in no checkpoint, and is measured at the next resume again.
        self.written = {(entry["step"], "eval_loss" in entry) for entry in metrics.read(self.file)}

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        held_out = "eval_loss" in logs
        event = (state.global_step, held_out)
        if event in self.written or not (held_out or "loss" in logs):
            return
        self.written.add(event)
        figures = {"eval_loss": logs["eval_loss"]} if held_out else logs
        place = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0}
        metrics.append(self.file, place | {"seconds": self.seconds()} | figures)
