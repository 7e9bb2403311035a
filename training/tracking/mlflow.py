"""Logs training to MLflow: parameters, metrics, and the sample answers as a table."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.options.trainer_options import TrainingOptions
from training.tracking.hide_secrets import without_secrets
from training.tracking.mlflow_address import tracking_problems
from training.tracking.mlflow_server import MlflowRun, as_metrics, short_timeouts
from training.tracking.tracker import ANSWERS, Entry, Service

logger = logging.getLogger(__name__)

TABLE = f"{ANSWERS}.json"  # artifact of the MLflow run
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's list of the artifacts that it shows as tables


def problems(options: TrainingOptions) -> list[str]:
    return tracking_problems("--mlflow-model-name", options.mlflow_model_name or None)


def service(record: dict[str, Any], output: Path) -> Service:
    return MlflowService(record, output)


class MlflowService:
    """The MLflow run of a training run. Sends the metrics that it does not have yet."""

    title = "MLflow"

    def __init__(self, record: dict[str, Any], output: Path) -> None:
        self.run = MlflowRun(record, output.name)
        self.tables = True  # until the store of the artifacts fails

    def attach(self) -> None:
        with short_timeouts():
            self.run.attach()

    def send(self, entries: list[Entry]) -> None:
        with short_timeouts():
            self.run.send(metric for entry in entries for metric in as_metrics(entry))
            tables = [entry.answers for entry in entries if entry.answers]
            if self.tables and tables:
                self._send_table(tables[-1])

    def _send_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replaces the table of answers. It is less important than the metrics, which its store must not delay."""
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        try:
            self.run.client.log_dict(self.run.run_id, table, TABLE)
            tag = json.dumps([{"path": TABLE, "type": "table"}])
            self.run.client.set_tag(self.run.run_id, TABLES_TAG, tag)
        except Exception as error:  # of any store of artifacts
            self.tables = False
            logger.warning(
                "MLflow takes no table of answers (%s); the output folder has them", without_secrets(error)
            )

    def end(self, status: str) -> None:
        with short_timeouts():
            self.run.end(status)
