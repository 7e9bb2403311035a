"""Logs a finished run to MLflow: its figures, the model with its prompt handling, a registered version."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import ROOT, RUN_FILE
from training.errors import TrackingError
from training.files import size_in_words
from training.model.generation import PARAMETERS
from training.storage.checkpoint import digests
from training.storage.copy import model_files
from training.storage.record import finished_run
from training.tracking.mlflow_server import Server, as_metrics, now, short_timeouts, without_secrets

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

WEIGHTS_TAG = "dolly_weights"  # a checksum: a run that is continued after its end logs another model
MODEL_NAME = "model"  # of the logged model within its MLflow run

# What the logged model's code imports when it answers, mlflow itself apart.
SERVED_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets"),
    *("numpy", "pandas", "pyarrow", "click", "jinja2"),
)


def log_finished(folder: Path, name: str | None = None) -> str:
    """Logs a finished run: the parameters and figures that its MLflow run lacks, the model, and the model's version.

    The model is logged as its files, with the code that answers beside them. MLflow makes a temporary copy of them on
    disk. What an earlier call has logged or registered is not logged again.

    Args:
        folder: of a finished run, or a whole copy of it.
        name: under which the model is registered; None: it is not.

    Returns:
        The URI that `mlflow.pyfunc.load_model` takes: models:/main.models.dolly/3, or models:/<id>.

    Raises:
        TrackingError: the run did not finish, its weights are not those that were verified, or MLflow failed.
    """
    record = finished_run(folder)
    record.setdefault("id", record["started"])
    weights = record.get("weights", {})
    if digests(folder, weights) != weights:
        raise TrackingError(f"{folder}: its weights are not those that training wrote and verified")
    server = Server(record, folder.name)
    try:
        with short_timeouts():  # a server that does not answer is reported soon; an upload may take its time
            server.attach()
        server.send(_all_metrics(folder, record))
        server.client.log_artifact(server.run_id, str(folder / RUN_FILE))
        mark = {WEIGHTS_TAG: hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()}
        uri = _log_and_register(server, folder, name, mark)
        server.end("FINISHED")
    except Exception as error:
        more = ". Make room, or export TMPDIR=FOLDER" if "No space left" in str(error) else ""
        raise TrackingError(f"MLflow: {without_secrets(error) or type(error).__name__}{more}") from error
    finally:
        with suppress(Exception):  # the first failure is the one to report
            server.end("FAILED")
    logger.info("logged to MLflow: %s", uri)
    return uri


def log_or_warn(folder: Path, name: str | None) -> None:
    """`log_finished` at the end of a training run, which MLflow must not fail: warns of a failure, with what to type."""
    try:
        log_finished(folder, name)
    except TrackingError as error:
        words = ["python", "-m", "training.tracking", "--model", str(folder)]
        logger.warning(
            "The model in %s is finished and whole, but it could not be logged: %s. Type %s",
            folder,
            error,
            shlex.join([*words, "--name", name] if name else words),
        )


def _log_and_register(server: Server, folder: Path, name: str | None, mark: dict[str, str]) -> str:
    """Logs the model and registers it under `name`, except where that is done already. Returns its URI."""
    import mlflow

    model_id, version = _ready_model(server, mark), None
    if model_id is None:
        files = model_files(folder)
        size = size_in_words(sum(file.stat().st_size for file in files))
        logger.info("logging the model to MLflow: %d files, %s", len(files), size)
        logged = _log_model(files, name, mark)
        model_id, version = logged.model_id, logged.registered_model_version
    uri = f"models:/{model_id}"
    if name is None:
        return uri
    version = version or _version_of(server, name, mark)
    return f"models:/{name}/{version or mlflow.register_model(uri, name, tags=mark).version}"


def _all_metrics(folder: Path, record: dict[str, Any]) -> list[Metric]:
    """Every figure of the run, and its results at the last step."""
    logged_at, metrics = now(), []
    with suppress(FileNotFoundError):
        for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
            metrics += as_metrics(entry["step"], entry, logged_at)
    losses = record["held_out_loss"]
    results = {
        "mean_train_loss": record["train_loss"],
        "held_out_loss_before": losses["before"],
        "held_out_loss_after": losses["after"],
        "training_seconds": record["seconds"]["training"],
    }
    return metrics + as_metrics(record["steps"], results, logged_at)


def _ready_model(server: Server, mark: dict[str, str]) -> str | None:
    """The id of the model with these weights that this run has logged already, whole."""
    outputs = server.client.get_run(server.run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        model = server.client.get_logged_model(output.model_id)
        if model.status == "READY" and mark.items() <= model.tags.items():
            return str(model.model_id)
    return None


def _version_of(server: Server, name: str, mark: dict[str, str]) -> str | None:
    """The version under which this run's model with these weights is registered already."""
    for found in server.client.search_model_versions(f"name='{name}'"):
        if found.run_id == server.run_id:
            version = server.client.get_model_version(
                name, found.version
            )  # Unity Catalog's search omits the tags
            if mark.items() <= version.tags.items():
                return str(version.version)
    return None


def _log_model(files: list[Path], registered: str | None, mark: dict[str, str]) -> Any:
    import mlflow

    with tempfile.TemporaryDirectory() as staged, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow wants an example, to try the model with
        data = Path(staged) / MODEL_NAME
        data.mkdir()
        for file in files:
            (data / file.name).symlink_to(file.resolve())  # MLflow copies what the links lead to
        return mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            loader_module="training.tracking.served",
            data_path=str(data),
            code_paths=[str(ROOT / "training")],
            signature=signature(),
            pip_requirements=served_requirements(),
            registered_model_name=registered,
            tags=mark,
        )


def served_requirements() -> list[str]:
    """What the logged model needs to answer, at the versions of this environment."""
    import mlflow

    needed = {package: version(package) for package in SERVED_PACKAGES}
    needed["mlflow-skinny"] = mlflow.__version__  # mlflow itself asks for an older pyarrow than ours
    return [f"{package}=={number.split('+')[0]}" for package, number in needed.items()]


def signature() -> ModelSignature:
    """What goes in and comes out, for registries (Unity Catalog takes no model without) and endpoints."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "instruction"), ColSpec("string", "input", required=False)]),
        outputs=Schema([ColSpec("string", "response")]),
        params=ParamSchema([ParamSpec(*parameter) for parameter in PARAMETERS]),
    )
