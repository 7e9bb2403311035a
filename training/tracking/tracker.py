"""What the trackers of a run share: their interface and the entries that they get.

A tracker is a file of this folder with its name (mlflow.py, wandb.py, trackio.py), and a name in TRACKERS of
training/options/reporting.py. The file has two functions:

    problems(options)           why it cannot be used here, such as a missing package; contacts no server
    service(record, output)     the Service that sends to it

TensorBoard alone has no such file: it needs no server (callbacks.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from training.data.source_names import joined
from training.options.reporting import TENSORBOARD
from training.tracking.hide_secrets import without_secrets

ANSWERS = "answers"  # name of the table of sample answers


@dataclass(frozen=True)
class Entry:
    """A log entry of the Trainer, or the table of all sample answers so far.

    Attributes:
        milliseconds: Unix time.
        answers: rows of the same columns: step, instruction, input and response, and history if a prompt has one.
    """

    step: int
    values: dict[str, Any]
    milliseconds: int
    answers: Sequence[dict[str, Any]] = ()

    def figures(self) -> dict[str, float]:
        """The finite numbers, by the Trainer's names."""
        return {
            name: float(value)
            for name, value in self.values.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }


class Service(Protocol):
    """Sends to one tracker, from a thread of its own. Each method may raise anything and may block.

    Attributes:
        title: the tracker's name in messages.
    """

    title: str

    def attach(self) -> None:
        """Finds the run by the id of run.json or starts it. Called again after any failure."""

    def send(self, entries: list[Entry]) -> None:
        """Sends what the tracker lacks of these entries. After a failure it gets them again."""

    def end(self, status: str) -> None:
        """Ends the run: FINISHED, KILLED (stopped by a signal) or FAILED."""


def tracker_modules(names: Iterable[str]) -> list[Any]:
    """The files of these trackers, TensorBoard's excepted."""
    return [import_module(f"training.tracking.{name}") for name in names if name != TENSORBOARD]


def parameters(record: dict[str, Any]) -> dict[str, Any]:
    """What describes a run: its options, settings, and the choices of the plan; URLs without passwords.

    The sources of its rows are one text, because a list is no parameter of MLflow.
    """
    plan_choices = {f"decided_{name}": value for name, value in (record.get("decided") or {}).items()}
    size = {name: record.get(name) for name in ("world_size", "global_batch", "precision")}
    options = record["options"] | {"training_dataset": joined(record["options"]["training_dataset"])}
    return {
        name: without_secrets(value) if isinstance(value, str) and "://" in value else value
        for name, value in (options | size | plan_choices).items()
    }


def panel_names(figures: dict[str, float]) -> dict[str, float]:
    """The names of transformers' callbacks, as in TensorBoard: train/loss and eval/loss, which make two panels."""
    return {
        f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in figures.items()
    }


def log_rows(
    run: Any, entries: list[Entry], last: int, table: Callable[[Sequence[dict[str, Any]]], Any]
) -> None:
    """Logs the entries after the step `last` to a run of W&B or Trackio, of which each step is one row.

    `table` makes the tracker's table from the answers of an entry.
    """
    for entry in entries:
        if entry.step > last:
            row: dict[str, Any] = dict(panel_names(entry.figures()))
            if entry.answers:
                row[ANSWERS] = table(entry.answers)
            run.log(row, step=entry.step)


def now() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
