"""Logs a finished run to MLflow: metrics, the model with its prompt format, and a registered version."""

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
from training.tracking.hide_secrets import reason
from training.tracking.mlflow_evaluation import stored_figures
from training.tracking.mlflow_server import MlflowRun, as_metrics, short_timeouts
from training.tracking.tracker import Entry, now

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

WEIGHTS_TAG = "dolly_weights"  # checksum of the weights; a run extended after its end logs a new model
MODEL_NAME = "model"  # name of the logged model in its MLflow run

# Packages that the logged model's code imports, except mlflow.
SERVED_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets"),
    *("numpy", "pandas", "pyarrow", "click", "jinja2"),
)


def log_finished(folder: Path, name: str | None = None) -> str:
    """Logs a finished run: parameters and metrics that its MLflow run lacks, the model, and the registered version.

    The model is logged as its files together with the code that generates answers. MLflow makes a temporary copy of the
    files on disk. Whatever an earlier call logged or registered is not logged again.

    Args:
        folder: folder of a finished run, or a complete copy of it.
        name: name to register the model under; None to not register it.

    Returns:
        URI for `mlflow.pyfunc.load_model`: models:/main.models.dolly/3, or models:/<id>.

    Raises:
        TrackingError: the run did not finish, its weights are gone or have changed since training verified them, or
            MLflow failed.
    """
    record = finished_run(folder)
    record.setdefault("id", record["started"])
    weights = record.get("weights", {})
    try:
        unchanged = digests(folder, weights) == weights
    except OSError as error:
        raise TrackingError(
            f"{error.filename}: cannot be read ({error.strerror}). Copy or train the model again"
        ) from error
    if not unchanged:
        raise TrackingError(f"{folder}: its weights have changed since training verified them")
    run = MlflowRun(record, folder.name)
    try:
        with short_timeouts():  # only for attach: an upload may take long
            run.attach()
        run.send(_all_metrics(folder, record))
        run.client.log_artifact(run.run_id, str(folder / RUN_FILE))
        tag = {WEIGHTS_TAG: hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()}
        uri = _log_and_register(run, folder, name, tag)
        run.end("FINISHED")
    except Exception as error:
        advice = ". Free disk space, or type export TMPDIR=FOLDER" if "No space left" in str(error) else ""
        raise TrackingError(f"MLflow: {reason(error)}{advice}") from error
    finally:
        with suppress(Exception):  # keep the first error
            run.end("FAILED")
    logger.info("logged to MLflow: %s", uri)
    return uri


def log_or_warn(folder: Path, name: str | None) -> None:
    """Calls `log_finished` at the end of training. A failure only logs a warning with the command to retry."""
    try:
        log_finished(folder, name)
    except TrackingError as error:
        words = ["python", "-m", "training.tracking", "--model", str(folder)]
        logger.warning(
            "The model in %s is complete, but could not be logged: %s. Type %s",
            folder,
            error,
            shlex.join([*words, "--name", name] if name else words),
        )


def _log_and_register(run: MlflowRun, folder: Path, name: str | None, tag: dict[str, str]) -> str:
    """Logs the model and registers it under `name`, unless already done. Returns its URI."""
    import mlflow

    model_id, version = _logged_model_id(run, tag), None
    if model_id is None:
        files = [file for file in model_files(folder) if file.parent == folder]  # without the adapter
        size = size_in_words(sum(file.stat().st_size for file in files))
        logger.info("logging the model to MLflow: %d files, %s", len(files), size)
        logged = _log_model(files, name, tag)
        model_id, version = logged.model_id, logged.registered_model_version
    uri = f"models:/{model_id}"
    if name is None:
        return uri
    version = version or _registered_version(run, name, tag)
    return f"models:/{name}/{version or mlflow.register_model(uri, name, tags=tag).version}"


def _all_metrics(folder: Path, record: dict[str, Any]) -> list[Metric]:
    """All logged metrics of the run, and its final results at the last step."""
    logged_at, metrics = now(), []
    with suppress(FileNotFoundError):
        for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
            metrics += as_metrics(Entry(entry["step"], entry, logged_at))
    losses = record["held_out_loss"]
    results = {
        "mean_train_loss": record["train_loss"],
        "held_out_loss_before": losses["before"],
        "held_out_loss_after": losses["after"],
        "training_seconds": record["seconds"]["training"],
    }
    return metrics + as_metrics(Entry(record["steps"], results | stored_figures(folder), logged_at))


def _logged_model_id(run: MlflowRun, tag: dict[str, str]) -> str | None:
    """Id of the model with these weights if this run has completely logged it, else None."""
    outputs = run.client.get_run(run.run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        model = run.client.get_logged_model(output.model_id)
        if model.status == "READY" and tag.items() <= model.tags.items():
            return str(model.model_id)
    return None


def _registered_version(run: MlflowRun, name: str, tag: dict[str, str]) -> str | None:
    """Registered version of this run's model with these weights, or None."""
    for found in run.client.search_model_versions(f"name='{name}'"):
        if found.run_id == run.run_id:
            # Unity Catalog's search omits the tags
            version = run.client.get_model_version(name, found.version)
            if tag.items() <= version.tags.items():
                return str(version.version)
    return None


def _log_model(files: list[Path], registered_name: str | None, tag: dict[str, str]) -> Any:
    import mlflow

    with tempfile.TemporaryDirectory() as staging, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow warns about a missing input example
        data = Path(staging) / MODEL_NAME
        data.mkdir()
        for file in files:
            (data / file.name).symlink_to(file.resolve())  # MLflow copies the targets of links
        return mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            loader_module="training.tracking.served",
            data_path=str(data),
            code_paths=[str(ROOT / "training")],
            signature=signature(),
            pip_requirements=served_requirements(),
            registered_model_name=registered_name,
            tags=tag,
        )


def served_requirements() -> list[str]:
    """pip requirements of the logged model, at the versions of this environment."""
    import mlflow

    versions = {package: version(package) for package in SERVED_PACKAGES}
    versions["mlflow-skinny"] = mlflow.__version__  # mlflow requires an older pyarrow than ours
    return [f"{package}=={number.split('+')[0]}" for package, number in versions.items()]


def signature() -> ModelSignature:
    """The model's inputs, outputs and parameters. Unity Catalog requires a signature.

    `history` has MLflow's type for any value, and `predict` checks it: as an array of objects, MLflow would refuse JSON
    text, messages with more keys than role and content, and a request in which only some rows have a history.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    inputs: list[ColSpec | TensorSpec] = [
        ColSpec("string", "instruction"),
        ColSpec("string", "input", required=False),
        ColSpec(AnyType(), "history", required=False),
    ]
    return ModelSignature(
        inputs=Schema(inputs),
        outputs=Schema([ColSpec("string", "response")]),
        params=ParamSchema([ParamSpec(*parameter) for parameter in PARAMETERS]),
    )
