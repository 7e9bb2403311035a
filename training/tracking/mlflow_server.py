"""The MLflow server: its address, the run on it, and what is sent there."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Iterable
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow.entities import Metric

RUN_TAG = "dolly_run"  # holds the id of run.json
LONGEST_VALUE = (
    500  # characters of a parameter or tag; servers before 2.10 take no more. run.json is logged whole
)
METRICS_AT_ONCE = 500  # MLflow takes 1,000

# How long the thread waits for a server, where the user has not said it. MLflow's own are 120 s, seven times over.
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "10",
}
SECRETS = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "DATABRICKS_TOKEN",
    "DATABRICKS_CLIENT_SECRET",
)


def parameters(record: dict[str, Any]) -> dict[str, str]:
    """The options of a run and what was decided for it, each value as MLflow takes it."""
    told = record["options"] | {
        name: record.get(name) for name in ("world_size", "global_batch", "precision")
    }
    told |= {f"decided_{name}": value for name, value in (record.get("decided") or {}).items()}
    return {name: _cut(value) for name, value in told.items()}


def tags(record: dict[str, Any]) -> dict[str, str]:
    """Commit, versions, base model and dataset of a run, and the id by which it is found again."""
    options = record["options"]
    told = {
        RUN_TAG: record["id"],
        "base_model": options["input_model"],
        "dataset": options["training_dataset"],
        "python": record["python"],
        **{f"version_{package}": number for package, number in record["versions"].items()},
    }
    if record["git_commit"]:
        told |= {"git_commit": record["git_commit"], "mlflow.source.git.commit": record["git_commit"]}
    return {name: _cut(value) for name, value in told.items()}


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def as_metrics(step: int, figures: dict[str, Any], milliseconds: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [
        Metric(name, float(value), milliseconds, step)
        for name, value in figures.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    ]


def shown(text: object) -> str:
    """One line of a text without any password or token in it, for logs."""
    line = " ".join(str(text).split())
    for name in SECRETS:
        if secret := os.environ.get(name):
            line = line.replace(secret, "***")
    line = re.sub(r"//[^/\s]*@", "//***@", line)
    line = re.sub(r"\?[^\s'\")]+=[^\s'\")]+", "?***", line)
    return line if len(line) <= 300 else line[:299] + "…"


class Server:
    """The MLflow run of a training run, at the active tracking URI. Whatever MLflow raises comes through.

    Attributes:
        attached: whether the run is there, and known is what it has.
        logged: (name, step) of the figures that the run has.
    """

    def __init__(self, record: dict[str, Any], name: str) -> None:
        import mlflow

        # Their warnings would tell of every attempt, and show URLs with passwords.
        for library in ("mlflow", "urllib3", "databricks", "alembic"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        mlflow.set_tracking_uri(tracking_uri() or "")
        self.mlflow, self.client = mlflow, mlflow.MlflowClient()
        self.record, self.name = record, name
        self.attached, self.run_id, self.logged = False, "", set[tuple[str, int]]()

    def attach(self) -> None:
        """Finds the run by its id, or begins it; makes it this thread's; logs parameters and tags."""
        run = self.mlflow.active_run()
        if run is None:
            found = self.mlflow.search_runs(
                filter_string=f"tags.{RUN_TAG} = '{self.record['id']}'", max_results=1, output_format="list"
            )
            run = self.mlflow.start_run(
                run_id=found[0].info.run_id if found else None,
                run_name=None if found else self.name,
                tags=tags(self.record),
            )
        self.run_id = run.info.run_id
        there = self.client.get_run(self.run_id).data
        # What was logged once cannot be changed; what a resumed run changed stands in its run.json.
        new = {name: value for name, value in parameters(self.record).items() if name not in there.params}
        self.mlflow.log_params(new)
        self.logged = {
            (name, metric.step)
            for name in there.metrics
            for metric in self.client.get_metric_history(self.run_id, name)
        }
        self.attached = True

    def send(self, metrics: Iterable[Metric]) -> None:
        """Logs those metrics that the run does not have yet."""
        missing = list({(m.key, m.step): m for m in metrics if (m.key, m.step) not in self.logged}.values())
        for begin in range(0, len(missing), METRICS_AT_ONCE):
            part = missing[begin : begin + METRICS_AT_ONCE]
            self.client.log_batch(self.run_id, metrics=part)
            self.logged |= {(metric.key, metric.step) for metric in part}

    def end(self, status: str) -> None:
        """Ends the run of this thread, if there is one, as FINISHED, KILLED or FAILED."""
        if self.mlflow.active_run() is not None:
            self.mlflow.end_run(status)


def now() -> int:
    return time.time_ns() // 1_000_000


def tracking_uri() -> str | None:
    """Where MLflow logs to: MLFLOW_TRACKING_URI, or Databricks' own; None where neither is there."""
    on_databricks = "databricks" if os.environ.get("DATABRICKS_RUNTIME_VERSION") else None
    return os.environ.get("MLFLOW_TRACKING_URI") or on_databricks


def tracking_problems(flag: str, name: str | None) -> list[str]:
    """Why nothing could be logged to MLflow, or registered under `name`, which was given by `flag`. Asks no server."""
    if find_spec("mlflow") is None:
        return ["MLflow is not installed. Type pip install '.[mlflow]', or leave --mlflow out"]
    problems = []
    uri = tracking_uri()
    part = r"[^\s/:.]{1,255}"
    if name is not None and not re.fullmatch(rf"{part}(\.{part}\.{part})?", name):
        problems.append(f"{flag} {name!r}: expected one word, or catalog.schema.model for Unity Catalog")
    elif name and uri and uri.startswith("databricks") and name.count(".") != 2:
        problems.append(f"{flag} {name!r}: Databricks expects catalog.schema.model")
    expected = "expected http(s)://HOST:PORT, databricks or sqlite:////FILE"
    if uri is None:
        return [
            *problems,
            "MLFLOW_TRACKING_URI is not set, so there is nowhere to log to. Type export MLFLOW_TRACKING_URI=http://HOST:PORT",
        ]
    # Where it has more than an address, the rest may be a password, in whatever place a slip of the hand has put it.
    hidden = uri if re.fullmatch(r"[\w.+:/~\[\]-]*", uri) else f"{uri.partition(':')[0][:5]}..."
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  (raises for a port that is none)
    except ValueError:  # its words repeat a part of the value
        return [*problems, f"MLFLOW_TRACKING_URI {hidden}: is no address; {expected}"]
    if parts.scheme in ("http", "https"):
        if not parts.hostname:
            problems.append(f"MLFLOW_TRACKING_URI {hidden}: names no host; {expected}")
        if parts.password is not None:
            problems.append(
                f"MLFLOW_TRACKING_URI {hidden}: holds a password. "
                "Leave it out, and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if parts.query or parts.fragment:
            problems.append(
                f"MLFLOW_TRACKING_URI {hidden}: has something behind its address. Leave it out; a token is given by "
                "MLFLOW_TRACKING_TOKEN"
            )
    elif not _is_store(uri, parts.scheme):
        problems.append(f"MLFLOW_TRACKING_URI {hidden}: MLflow has no store of that kind; {expected}")
    return problems


def _is_store(uri: str, scheme: str) -> bool:
    known = ("", "file", "databricks", "sqlite", "postgresql", "mysql", "mssql")
    plugins = {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    return uri == "databricks" or scheme.split("+")[0] in known or scheme in plugins
