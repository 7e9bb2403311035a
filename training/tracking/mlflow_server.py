"""The MLflow server: finds or starts the MLflow run, and sends metrics to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from training.data.source_names import joined
from training.tracking.mlflow_address import tracking_uri
from training.tracking.tracker import Entry, parameters

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RUN_TAG = "dolly_run"  # holds the id of run.json
METRICS_AT_ONCE = 500  # MLflow's limit is 1,000
SHORT_TIMEOUTS = {  # seconds and retries; MLflow's defaults are 120 s and 7
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "10",
}


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Shortens MLflow's timeouts for a server that does not answer, unless the user has set them."""
    added = {name: value for name, value in SHORT_TIMEOUTS.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def tags(record: dict[str, Any]) -> dict[str, str]:
    """MLflow tags of a run: its id for later look-ups, commit, package versions, base model and dataset."""
    commit = record["git_commit"]
    return {
        RUN_TAG: record["id"],
        "base_model": record["options"]["input_model"],
        "dataset": joined(record["options"]["training_dataset"]),
        "python": record["python"],
        **{f"version_{package}": number for package, number in record["versions"].items()},
        **({"git_commit": commit, "mlflow.source.git.commit": commit} if commit else {}),
    }


def as_metrics(entry: Entry) -> list[Metric]:
    """MLflow metrics of the figures of an entry."""
    from mlflow.entities import Metric

    return [Metric(name, value, entry.milliseconds, entry.step) for name, value in entry.figures().items()]


class MlflowRun:
    """The MLflow run of a training run, at the active tracking URI. Raises what MLflow raises.

    Attributes:
        attached: whether the MLflow run was found or started and `logged` is up to date.
        logged: (name, step) of the metrics that the MLflow run has.
    """

    client: MlflowClient

    def __init__(self, record: dict[str, Any], name: str) -> None:
        self.record, self.name = record, name
        self.attached, self.run_id, self.logged = False, "", set[tuple[str, int]]()

    def attach(self) -> None:
        """Finds the run by its id or starts it, makes it this thread's active run, and logs parameters and tags."""
        import mlflow

        # Their warnings repeat for every attempt and show URLs with passwords.
        for library in ("mlflow", "urllib3", "databricks", "alembic"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        mlflow.set_tracking_uri(tracking_uri() or "")
        self.client = mlflow.MlflowClient()
        run = mlflow.active_run()
        if run is None:
            own_id = f"tags.{RUN_TAG} = '{self.record['id']}'"
            found = mlflow.search_runs(filter_string=own_id, max_results=1, output_format="list")
            run_id = found[0].info.run_id if found else None
            try:
                run = mlflow.start_run(run_id, run_name=None if found else self.name, tags=tags(self.record))
            except Exception:
                if found:  # MLflow may have set it to RUNNING already
                    with suppress(Exception):
                        self.client.update_run(found[0].info.run_id, status=found[0].info.status)
                raise
        self.run_id = run.info.run_id
        existing = self.client.get_run(self.run_id).data
        # MLflow does not allow a logged parameter to change; run.json has the options of a resume.
        new = {name: value for name, value in parameters(self.record).items() if name not in existing.params}
        mlflow.log_params(new)
        self.logged = {
            (name, metric.step)
            for name in existing.metrics
            for metric in self.client.get_metric_history(self.run_id, name)
        }
        self.attached = True

    def send(self, metrics: Iterable[Metric]) -> None:
        """Logs the metrics that the run does not have yet."""
        missing = list({(m.key, m.step): m for m in metrics if (m.key, m.step) not in self.logged}.values())
        for begin in range(0, len(missing), METRICS_AT_ONCE):
            part = missing[begin : begin + METRICS_AT_ONCE]
            self.client.log_batch(self.run_id, metrics=part)
            self.logged |= {(metric.key, metric.step) for metric in part}

    def end(self, status: str) -> None:
        """Ends this thread's active MLflow run, if any, with status FINISHED, KILLED or FAILED."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.end_run(status)
