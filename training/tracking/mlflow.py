"""Sends the metrics of a training run to MLflow from a background thread, so that no step waits for the server."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from training.tracking.mlflow_server import MlflowRun, as_metrics, now, short_timeouts, without_secrets

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

START_SECONDS = 5  # how long the start of training waits for the first attempt
SEND_SECONDS = 2  # between two batches of metrics
RETRY_SECONDS = 30  # from a failure to the next attempt
CLOSE_SECONDS = 5  # how long the end of training waits for the last metrics; a launcher kills a rank after 30


class MlflowLog(TrainerCallback):
    """Passes the Trainer's logs to a thread, which sends them to the server.

    transformers' MLflowCallback calls the server from the training thread, ends training if the server is down, loses
    the metrics logged meanwhile, and logs the steps after a checkpoint twice in a resumed run.

    Args:
        record: the run's record (run.json), including the choices of the plan.
        name: name of a new MLflow run.
    """

    def __init__(self, record: dict[str, Any], name: str) -> None:
        self.run = MlflowRun(record, name)
        self.status = "FAILED"  # until the Trainer reaches its end
        self.entries: queue.SimpleQueue[tuple[int, dict[str, Any], int]] = queue.SimpleQueue()
        self.attempted, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._send_until_closed, name="mlflow", daemon=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        for entry in state.log_history:  # a resumed run; the server may lack some
            self.entries.put((entry["step"], entry, now()))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.entries.put((state.global_step, logs.copy(), now()))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.status = "FINISHED" if state.global_step >= state.max_steps else "KILLED"

    def _send_until_closed(self) -> None:
        unsent: list[Metric] = []
        failed = last = False
        while not last:
            last = self.closing.is_set()
            try:
                if not self.run.attached:
                    self.run.attach()
                    if failed:
                        logger.info("MLflow answers again")
                    failed = False
                while not self.entries.empty():
                    unsent += as_metrics(*self.entries.get())
                self.run.send(unsent)
                unsent = []
                if last:
                    self.run.end(self.status)
            # From MLflow, requests, SQLAlchemy or Databricks. Training must continue.
            except Exception as error:
                # The server may have stored part of the request; attach reads what it has.
                self.run.attached = False
                if not failed:
                    logger.warning(
                        "MLflow does not answer (%s). Training continues; metrics are kept and sent when it answers",
                        without_secrets(error),
                    )
                failed = True
            self.attempted.set()
            self.closing.wait(RETRY_SECONDS if failed else SEND_SECONDS)


@contextmanager
def mlflow_logging(record: dict[str, Any], name: str) -> Iterator[MlflowLog]:
    """Yields the callback that logs training to MLflow, and sends the last metrics on exit."""
    log = MlflowLog(record, name)
    with short_timeouts():
        log.thread.start()
        log.attempted.wait(START_SECONDS)  # a warning should appear before the first step
        try:
            yield log
        finally:
            log.closing.set()
            log.thread.join(CLOSE_SECONDS)
