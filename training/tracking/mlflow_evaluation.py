"""Sends the figures of an evaluation to the MLflow run of the training run."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.consts import EVALUATION_FILE
from training.errors import TrackingError
from training.tracking.hide_secrets import reason
from training.tracking.mlflow_address import tracking_problems
from training.tracking.mlflow_server import MlflowRun, as_metrics, short_timeouts
from training.tracking.tracker import Entry, now

logger = logging.getLogger(__name__)

ENDS = {"value": "", "low": "_low", "high": "_high"}  # suffixes of a figure and the ends of its interval


def evaluation_figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The figures of evaluation.json by MLflow name: evaluation/held_out/rouge_l/tuned, and .../tuned_low and _high.

    A source is evaluation/held_out/sources/alpaca/rouge_l/tuned. Categories are left out: their names may be any text.
    """
    figures = {}
    for path, metrics in _tables(evaluation):
        for metric, models in metrics.items():
            for model, interval in models.items():
                for end, suffix in ENDS.items():
                    if interval is not None and interval[end] is not None:
                        name = re.sub(r"[^\w\-./ ]", "_", f"evaluation/{path}/{metric}/{model}{suffix}")
                        figures[name] = float(interval[end])
    return figures


def _tables(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind in ("held_out", "file"):
        if kind in evaluation:
            yield kind, evaluation[kind]["metrics"]
            for label, part in evaluation[kind].get("sources", {}).items():
                yield f"{kind}/sources/{label}", part["metrics"]
    for task, part in evaluation.get("tasks", {}).get("tasks", {}).items():
        yield f"tasks/{task}", part["metrics"]


def stored_figures(folder: Path) -> dict[str, float]:
    """The figures of the evaluation.json in a model's folder; {} if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return evaluation_figures(json.loads((folder / EVALUATION_FILE).read_text()))
    return {}


def log_evaluation(record: Mapping[str, Any], name: str, evaluation: Mapping[str, Any]) -> None:
    """Logs an evaluation to the MLflow run of a finished run. A later evaluation adds newer values.

    Args:
        record: the run's record (run.json).
        name: of a new MLflow run, if the server has none of this run.

    Raises TrackingError if MLflow is not installed, not configured or does not answer.
    """
    if problems := tracking_problems("--mlflow-model-name", None):
        raise TrackingError("; ".join(problems))
    run = MlflowRun(dict(record), name)
    try:
        with short_timeouts():
            try:
                run.attach()
                run.logged.clear()  # a later evaluation of the same step counts
                run.send(as_metrics(Entry(record["steps"], evaluation_figures(evaluation), now())))
            finally:
                run.end("FINISHED")  # the training is, also if its evaluation could not be logged
    except Exception as error:  # from MLflow, requests, SQLAlchemy or Databricks
        raise TrackingError(f"MLflow: {reason(error)}") from error
