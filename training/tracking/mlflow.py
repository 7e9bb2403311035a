"""Follows a training run in MLflow, from a thread that never holds up a step."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.tracking.mlflow_server import IMPATIENT, Server, as_metrics, now, shown

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

START_SECONDS = 5  # that training waits for the server's first answer
SEND_SECONDS = 2  # between two batches of figures
RETRY_SECONDS = 30  # from a failure to the next attempt
CLOSE_SECONDS = 5  # that the end of training waits for the last figures; a launcher that stops a run gives 30


class MlflowLog(TrainerCallback):
    """Hands each figure that the Trainer logs to a thread that speaks to the server. No method of it waits for one.

    Args:
        record: of the run, as `start_record` and the plan made it.
        name: that a new MLflow run gets.
    """

    def __init__(self, record: dict[str, Any], name: str) -> None:
        self.record, self.name = record, name
        self.status = "FAILED"  # unless the Trainer comes to its end
        self.figures: queue.SimpleQueue[tuple[int, dict[str, Any], int]] = queue.SimpleQueue()
        self.asked, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for entry in state.log_history:  # of a resumed run; the server may have missed some
            self.figures.put((entry["step"], dict(entry), now()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.figures.put((state.global_step, dict(logs or {}), now()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.status = "FINISHED" if state.global_step >= state.max_steps else "KILLED"

    def _follow(self) -> None:
        server: Server | None = None
        kept: list[Metric] = []
        failed = False
        while True:
            last = self.closing.is_set()
            try:
                if server is None:
                    server = Server(self.record, self.name)
                while not self.figures.empty():
                    kept += as_metrics(*self.figures.get())
                if not server.attached:
                    server.attach()
                    if failed:
                        logger.info("MLflow answers again")
                    failed = False
                server.send(kept)
                kept = []
                if last:
                    server.end(self.status)
            except (
                Exception
            ) as error:  # of MLflow, requests, SQLAlchemy, Databricks; training goes on in any case
                if server is not None:
                    server.attached = (
                        False  # a request that failed may have been taken: ask again what is there
                    )
                if not failed:
                    logger.warning(
                        "MLflow does not answer (%s). Training goes on; figures are kept, and sent when it does",
                        shown(error),
                    )
                failed = True
            self.asked.set()
            if last:
                return
            self.closing.wait(RETRY_SECONDS if failed else SEND_SECONDS)


@contextmanager
def tracked(asked: bool, record: dict[str, Any], folder: Path) -> Iterator[list[TrainerCallback]]:
    """The callbacks by which MLflow follows the training in the `with`; none where it is not `asked`."""
    if not asked:
        yield []
        return
    impatient = {name: value for name, value in IMPATIENT.items() if name not in os.environ}
    os.environ |= impatient
    log = MlflowLog(record, folder.name)
    log.thread.start()
    log.asked.wait(START_SECONDS)  # so that a warning comes before the first step
    try:
        yield [log]
    finally:
        log.closing.set()
        log.thread.join(CLOSE_SECONDS)
        for name in impatient:
            os.environ.pop(name, None)
