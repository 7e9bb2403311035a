"""Sends the figures of a run to a tracker from a thread, so that no step waits for a server."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from training.consts import SAMPLES_FILE
from training.data.conversations import messages_text
from training.data.table import HISTORY
from training.storage import metrics
from training.tracking.hide_secrets import reason
from training.tracking.tracker import Entry, Service, now

logger = logging.getLogger(__name__)

START_SECONDS = 5.0  # how long the start of training waits for the first attempt
SEND_SECONDS = 2.0  # between two batches of figures
RETRY_SECONDS = 30.0  # from a failure to the next attempt
CLOSE_SECONDS = 12.0  # how long the end of training waits; a launcher kills a rank after 30
MOST_ANSWERS = 1000  # rows of the table of answers, the newest: each sampling sends it again


class AnswersLog(TrainerCallback):
    """A callback that also gets the sample answers of --sample-prompts."""

    def log_answers(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """Gets the answers of this step as samples.jsonl has them: instruction, input, history if there is one, response."""
        raise NotImplementedError


class BackgroundLog(AnswersLog):
    """Passes the Trainer's logs to a thread, which sends them to a tracker.

    transformers' callbacks for MLflow, W&B and Trackio call the server from the training thread. A server that is down
    ends or delays training, its metrics are lost, and a resumed run logs the steps after its checkpoint twice.
    """

    def __init__(self, service: Service, output: Path) -> None:
        self.service, self.output = service, output
        self.status = "FAILED"  # until the Trainer reaches its end
        self.failed = False  # the last attempt to reach the tracker
        self.entries: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        self.attempted, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._send_until_closed, name=service.title, daemon=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        for entry in state.log_history:  # a resumed run; the server may lack some
            self.entries.put(Entry(entry["step"], entry, now()))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.entries.put(Entry(state.global_step, logs.copy(), now()))

    def log_answers(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        rows = metrics.read(self.output / SAMPLES_FILE)[-MOST_ANSWERS:]
        self.entries.put(Entry(step, {}, now(), _answers_table(rows)))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.status = "FINISHED" if state.global_step >= state.max_steps else "KILLED"

    def _send_until_closed(self) -> None:
        title = self.service.title
        unsent: list[Entry] = []
        attached = last = False
        while not last:
            last = self.closing.is_set()
            try:
                if not attached:
                    self.service.attach()
                    if self.failed:
                        logger.info("%s answers again", title)
                    attached, self.failed = True, False
                while not self.entries.empty():
                    unsent.append(self.entries.get())
                self.service.send(unsent)
                unsent = []
                if last:
                    self.service.end(self.status)
            # From the tracker's package, or what it uses. Training must continue.
            except Exception as error:
                attached = False  # the server may have stored part of it; attach reads what it has
                if not self.failed:
                    logger.warning(
                        "%s does not answer (%s). Training continues; metrics are kept and sent when it answers",
                        title,
                        reason(error),
                    )
                self.failed = True
            self.attempted.set()
            self.closing.wait(RETRY_SECONDS if self.failed else SEND_SECONDS)


def _answers_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of samples.jsonl with the same columns each: a history as text, if any of them has one."""
    histories = [messages_text(row.get(HISTORY) or ()) for row in rows]
    return [
        {"step": row["step"]}
        | ({HISTORY: history} if any(histories) else {})
        | {name: row.get(name) for name in ("instruction", "input", "response")}
        for row, history in zip(rows, histories, strict=True)
    ]


@contextmanager
def background_logs(services: list[Service], output: Path) -> Iterator[list[BackgroundLog]]:
    """Yields the callbacks that log training to these trackers, and sends the last figures on exit."""
    logs = [BackgroundLog(service, output) for service in services]
    for log in logs:
        log.thread.start()
    end = time.monotonic() + START_SECONDS
    for log in logs:
        log.attempted.wait(max(0.0, end - time.monotonic()))  # a warning should appear before the first step
    try:
        yield logs
    finally:
        for log in logs:
            log.closing.set()
        end = time.monotonic() + CLOSE_SECONDS
        for log in logs:
            log.thread.join(max(0.0, end - time.monotonic()))
            late = log.thread.is_alive()
            if late or log.failed:
                logger.warning(
                    "%s: the last figures were not sent%s. The output folder has all of them",
                    log.service.title,
                    f" within {CLOSE_SECONDS:.0f} s" if late else "",
                )
