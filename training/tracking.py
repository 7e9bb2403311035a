"""MLflow: a run's parameters, its figures while it trains, and the finished model with its prompt handling inside.

    python -m training.tracking --model /local_disk0/dolly --name main.models.dolly

Nothing here ends a run or holds up a step. A thread of rank 0 speaks to the server; what the server did not take is
kept and sent when it answers, at the latest with the finished model, or by the command above. An MLflow run is found
again by the id in run.json, so that a resumed run goes on in it, and nothing is logged twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
import re
import shlex
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.checkpoint import digests
from training.checks import size_in_words
from training.consts import RUN_FILE
from training.faults import tracking_faults, tracking_uri
from training.publish import model_files
from training.record import read_run_record
from training.served import signature

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

RUN_TAG = "dolly_run"  # holds the id of run.json
WEIGHTS_TAG = "dolly_weights"  # a checksum: a run that is continued after its end logs another model
MODEL_NAME = "model"  # of the logged model within its MLflow run
LONGEST_VALUE = (
    500  # characters of a parameter or tag; servers before 2.10 take no more. run.json is logged whole
)
METRICS_AT_ONCE = 500  # MLflow takes 1,000

START_SECONDS = 5  # that training waits for the server's first answer
SEND_SECONDS = 2  # between two batches of figures
RETRY_SECONDS = 30  # from a failure to the next attempt
CLOSE_SECONDS = 5  # that the end of training waits for the last figures; a launcher that stops a run gives 30

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

# What the logged model's code imports when it answers, mlflow itself apart.
SERVED_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets"),
    *("numpy", "pandas", "pyarrow", "click", "jinja2"),
)


class TrackingError(RuntimeError):
    """The finished model could not be logged; the message says why. The model is untouched."""


# --- what is told of a run ---------------------------------------------------------------------------


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


def _metrics(step: int, figures: dict[str, Any], milliseconds: int) -> list[Metric]:
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


# --- the server --------------------------------------------------------------------------------------


class _Server:
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


# --- while a run trains ------------------------------------------------------------------------------


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
            self.figures.put((entry["step"], dict(entry), _now()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.figures.put((state.global_step, dict(logs or {}), _now()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.status = "FINISHED" if state.global_step >= state.max_steps else "KILLED"

    def _follow(self) -> None:
        server: _Server | None = None
        kept: list[Metric] = []
        failed = False
        while True:
            last = self.closing.is_set()
            try:
                if server is None:
                    server = _Server(self.record, self.name)
                while not self.figures.empty():
                    kept += _metrics(*self.figures.get())
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


def _now() -> int:
    return time.time_ns() // 1_000_000


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


# --- the finished model ------------------------------------------------------------------------------


def log_finished(folder: Path, name: str | None = None) -> str:
    """Logs a finished run: what its MLflow run lacks of parameters and figures, the model, and the model's version.

    The model is logged as its files, with the code that answers beside them; a temporary copy of them is made on disk,
    and none is held in memory. What an earlier call has logged or registered is not logged again.

    Args:
        folder: of a finished run, or a whole copy of it.
        name: under which the model is registered; None: it is not.

    Returns:
        The URI that `mlflow.pyfunc.load_model` takes: models:/main.models.dolly/3, or models:/<id>.

    Raises:
        TrackingError: the run did not finish, its weights are not those that were verified, or MLflow failed.
    """
    record = read_run_record(folder)
    if record is None or record["status"] != "finished":
        raise TrackingError(
            f"{folder}: holds no finished run. Name the --local-output-dir of one, or a copy of it"
        )
    record.setdefault("id", record["started"])
    names = [file.name for file in model_files(folder)]
    weights = record.get("weights", {})
    if digests(folder, weights) != weights:
        raise TrackingError(f"{folder}: its weights are not those that training wrote and verified")
    server = None
    try:
        impatient = {name: value for name, value in IMPATIENT.items() if name not in os.environ}
        os.environ |= impatient  # whether the server is there is told soon; an upload may take its time
        try:
            server = _Server(record, folder.name)
            server.attach()
        finally:
            for variable in impatient:
                os.environ.pop(variable, None)
        server.send(_all_metrics(folder, record))
        server.client.log_artifact(server.run_id, str(folder / RUN_FILE))
        mark = {WEIGHTS_TAG: hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()}
        model_id, number = _ready_model(server, mark), None
        if model_id is None:
            size = sum((folder / file).stat().st_size for file in names)
            logger.info("logging the model to MLflow: %d files, %s", len(names), size_in_words(size))
            logged = _log_model(folder, names, name, mark)
            model_id, number = logged.model_id, logged.registered_model_version
        uri = f"models:/{model_id}"
        if name:
            number = number or _version_of(server, name, mark)
            uri = f"models:/{name}/{number or server.mlflow.register_model(uri, name, tags=mark).version}"
        server.end("FINISHED")
    except Exception as error:
        more = ". Make room, or export TMPDIR=FOLDER" if "No space left" in str(error) else ""
        raise TrackingError(f"MLflow: {shown(error) or type(error).__name__}{more}") from error
    finally:
        if server is not None:
            with suppress(Exception):  # the first failure is the one to tell
                server.end("FAILED")
    logger.info("logged to MLflow: %s", uri)
    return uri


def log_or_tell(folder: Path, name: str | None) -> None:
    """`log_finished` at the end of a training run, which MLflow shall not fail: a failure is told with what to type."""
    try:
        log_finished(folder, name)
    except TrackingError as error:
        words = [
            "python",
            "-m",
            "training.tracking",
            "--model",
            str(folder),
            *(["--name", name] if name else []),
        ]
        logger.warning(
            "The model in %s is finished and whole, but it could not be logged: %s. Type %s",
            folder,
            error,
            shlex.join(words),
        )


def _all_metrics(folder: Path, record: dict[str, Any]) -> list[Metric]:
    """Every figure of the run, and its results at the last step."""
    now, metrics = _now(), []
    with suppress(FileNotFoundError):
        for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
            metrics += _metrics(entry["step"], entry, now)
    losses = record["held_out_loss"]
    results = {
        "mean_train_loss": record["train_loss"],
        "held_out_loss_before": losses["before"],
        "held_out_loss_after": losses["after"],
        "training_seconds": record["seconds"]["training"],
    }
    return metrics + _metrics(record["steps"], results, now)


def _ready_model(server: _Server, mark: dict[str, str]) -> str | None:
    """The id of the model with these weights that this run has logged already, whole."""
    outputs = server.client.get_run(server.run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        model = server.client.get_logged_model(output.model_id)
        if model.status == "READY" and mark.items() <= model.tags.items():
            return str(model.model_id)
    return None


def _version_of(server: _Server, name: str, mark: dict[str, str]) -> str | None:
    """The version under which this run's model with these weights is registered already."""
    for found in server.client.search_model_versions(f"name='{name}'"):
        if found.run_id == server.run_id:  # asked for singly, as Unity Catalog's search leaves the tags out
            version = server.client.get_model_version(name, found.version)
            if mark.items() <= version.tags.items():
                return str(version.version)
    return None


def _log_model(folder: Path, names: list[str], registered: str | None, mark: dict[str, str]) -> Any:
    import mlflow

    with tempfile.TemporaryDirectory() as staged, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # it wants an example, and would load the model to try it
        data = Path(staged) / MODEL_NAME
        data.mkdir()
        for name in names:
            (data / name).symlink_to((folder / name).resolve())  # MLflow copies what they lead to
        return mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            loader_module="training.served",
            data_path=str(data),
            code_paths=[str(Path(__file__).parent)],
            signature=signature(),
            pip_requirements=served_requirements(),
            registered_model_name=registered,
            tags=mark,
        )


def served_requirements() -> list[str]:
    """What the logged model needs to answer, at the versions of this environment."""
    import mlflow

    # mlflow itself would ask for an older pyarrow than training is tested with.
    needed = {package: version(package) for package in SERVED_PACKAGES} | {
        "mlflow-skinny": mlflow.__version__
    }
    return [f"{package}=={number.split('+')[0]}" for package, number in needed.items()]


@click.command()
@click.option(
    "--model",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A finished run's --local-output-dir, or a whole copy of it.",
)
@click.option(
    "--name", default=None, help="Register it under this name, catalog.schema.model for Unity Catalog."
)
def main(folder: Path, name: str | None) -> None:
    """Log a finished model to the active MLflow tracking URI, or go on with what broke off. Trains nothing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    faults = tracking_faults("--name", name)
    try:
        if faults:
            raise TrackingError("\n".join(faults))
        log_finished(folder.expanduser(), name)
    except TrackingError as error:
        print(f"Cannot log: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
