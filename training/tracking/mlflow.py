"""Sends the figures of a training run to MLflow, from a thread that never holds up a step."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from training.tracking.mlflow_server import Server, as_metrics, now, short_timeouts, without_secrets

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

START_SECONDS = 5  # that training waits for the server's first answer
SEND_SECONDS = 2  # between two batches of figures
RETRY_SECONDS = 30  # from a failure to the next attempt
CLOSE_SECONDS = 5  # that the end of training waits for the last figures; a launcher that stops a run gives 30


class MlflowLog(TrainerCallback):
    """Hands each figure that the Trainer logs to a thread, which sends it to the server.

    transformers' own MLflowCallback asks the server in the training's thread, ends the training where there is none,
    loses what a server misses, and logs the steps after a checkpoint twice in a run that is resumed.

    Args:
        record: the run's record (run.json), with what the plan has decided.
        name: of a new MLflow run.
    """

    def __init__(self, record: dict[str, Any], name: str) -> None:
        self.server = Server(record, name)
        self.status = "FAILED"  # unless the Trainer comes to its end
        self.figures: queue.SimpleQueue[tuple[int, dict[str, Any], int]] = queue.SimpleQueue()
        self.tried, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._send_until_closed, name="mlflow", daemon=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        for entry in state.log_history:  # of a resumed run; the server may have missed some
            self.figures.put((entry["step"], entry, now()))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.figures.put((state.global_step, logs.copy(), now()))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.status = "FINISHED" if state.global_step >= state.max_steps else "KILLED"

    def _send_until_closed(self) -> None:
        unsent: list[Metric] = []
        failed = last = False
        while not last:
            last = self.closing.is_set()
            try:
                if not self.server.attached:
                    self.server.attach()
                    if failed:
                        logger.info("MLflow answers again")
                    failed = False
                while not self.figures.empty():
                    unsent += as_metrics(*self.figures.get())
                self.server.send(unsent)
                unsent = []
                if last:
                    self.server.end(self.status)
            except (
                Exception
            ) as error:  # of MLflow, requests, SQLAlchemy, Databricks; training goes on in any case
                self.server.attached = False  # the server may have taken the request: ask again what it has
                if not failed:
                    logger.warning(
                        "MLflow does not answer (%s). Training goes on; figures are kept, and sent when it does",
                        without_secrets(error),
                    )
                failed = True
            self.tried.set()
            self.closing.wait(RETRY_SECONDS if failed else SEND_SECONDS)


@contextmanager
def mlflow_log(record: dict[str, Any], name: str) -> Iterator[MlflowLog]:
    """The callback by which MLflow follows the training in the `with`."""
    log = MlflowLog(record, name)
    with short_timeouts():
        log.thread.start()
        log.tried.wait(START_SECONDS)  # so that a warning comes before the first step
        try:
            yield log
        finally:
            log.closing.set()
            log.thread.join(CLOSE_SECONDS)
