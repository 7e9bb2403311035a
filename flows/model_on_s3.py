"""Pushes the finished model of a flow's run to S3, and fetches it by the run's id.

    python flows/model_on_s3.py 1764229912 --to dolly       then: python -m training.generate --model dolly "..."

The model is under METAFLOW_DATATOOLS_S3ROOT/<flow>/<run id>/, and its checkpoints are in checkpoints/ there. run.json is
copied last, so training.generate refuses an incomplete copy. The artifact `model` of the run holds each file's size and
SHA-256.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from training.consts import RUN_FILE
from training.files import file_digest
from training.options.command_line import CheckedCommand, PathName

# The flows by name, and the file of each.
FLOWS = {"TrainDollyFlow": "train_dolly_flow.py", "TrainDollyNodesFlow": "train_dolly_nodes_flow.py"}
LEFTOVER = "metaflow.s3." + 8 * "[a-z0-9_]"  # S3(tmproot=...) copies into a mkdtemp folder
NO_METAFLOW = "Metaflow is not installed. Type pip install '.[metaflow]'"


class StoreError(RuntimeError):
    """The model could not be pushed or fetched. The message says why and what to type."""


def root_problems() -> list[str]:
    """Why the configured root cannot be reached; [] if it can, or if none is configured."""
    from metaflow.metaflow_config import DATATOOLS_CLIENT_PARAMS, DATATOOLS_S3ROOT
    from metaflow.plugins.datatools.s3.s3util import get_s3_client

    if not DATATOOLS_S3ROOT:
        return []
    from botocore.config import Config

    bucket = DATATOOLS_S3ROOT.removeprefix("s3://").split("/")[0]
    # The user's settings are a dict until Metaflow has created its first client.
    config = DATATOOLS_CLIENT_PARAMS.get("config") or {}
    config = config if isinstance(config, Config) else Config(**config)
    # Metaflow's default retries take too long while a user waits.
    quick = config.merge(Config(connect_timeout=10, read_timeout=10, retries={"total_max_attempts": 3}))
    client, _ = get_s3_client(s3_client_params={**DATATOOLS_CLIENT_PARAMS, "config": quick})
    try:
        client.head_bucket(Bucket=bucket)
    except Exception as error:  # of boto3: no bucket, no permission, no connection
        return [
            f"METAFLOW_DATATOOLS_S3ROOT {DATATOOLS_S3ROOT}: the bucket {bucket!r} cannot be reached ({error}). "
            "Create it, or grant write access to it"
        ]
    return []


def checkpoint_target(flow: str, run_id: str) -> str | None:
    """Where a run copies its checkpoints, so that a retry on another pod goes on; None if no root is configured."""
    from metaflow.metaflow_config import DATATOOLS_S3ROOT

    return f"{DATATOOLS_S3ROOT.rstrip('/')}/{flow}/{run_id}/checkpoints" if DATATOOLS_S3ROOT else None


def use_metaflow_s3() -> None:
    """Lets the training command find the S3 server that Metaflow is configured for, if it is not Amazon's."""
    from metaflow.metaflow_config import S3_ENDPOINT_URL

    if S3_ENDPOINT_URL and "AWS_ENDPOINT_URL" not in os.environ:
        os.environ.setdefault("AWS_ENDPOINT_URL_S3", S3_ENDPOINT_URL)


@contextmanager
def _as_store_errors(url: str, advice: str = "") -> Iterator[None]:
    """Turns Metaflow's and boto3's errors, which share no class, into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{url}: {type(error).__name__}: {error}{advice}") from error


def push(folder: Path, files: dict[str, dict[str, Any]], run: Any) -> str | None:
    """Copies a finished model's `files` ({name: {"size", "sha256"}} from `copy.model_digests`) to S3 under the run.

    Correct files of an earlier attempt are kept. Returns the URL of the folder, or None if no root is configured.
    Raises StoreError; the local model is never changed.
    """
    from metaflow import S3, current
    from metaflow.metaflow_config import DATATOOLS_S3ROOT
    from metaflow.plugins.datatools.s3 import S3PutObject

    if not DATATOOLS_S3ROOT:
        return None
    # The URL that S3(run=run) uses, for messages.
    root = f"{DATATOOLS_S3ROOT.rstrip('/')}/{current.flow_name}/{current.run_id}"
    with _as_store_errors(root), S3(run=run) as s3:
        arrived = _uploaded(s3, files)
        for names in (files.keys() - {RUN_FILE}, {RUN_FILE}):
            missing = sorted(names - arrived)
            objects = [
                S3PutObject(key=name, path=str(folder / name), metadata={"sha256": files[name]["sha256"]})
                for name in missing
            ]
            urls = s3.put_files(objects) if objects else []
            if len(urls) != len(missing):  # for a missing bucket it returns [] without an error
                raise StoreError(f"{root}: {len(urls)} of {len(missing)} files arrived")
        wrong = sorted(files.keys() - _uploaded(s3, files))
        if wrong:
            raise StoreError(f"{root}: files are missing or differ from the local ones: {', '.join(wrong)}")
    return root


def _uploaded(s3: Any, files: dict[str, dict[str, Any]]) -> set[str]:
    """Names of the files that are on S3 with the same size and SHA-256."""
    return {
        found.key
        for found in s3.info_many(list(files), return_missing=True)
        if found.exists
        and {"size": found.size, "sha256": (found.metadata or {}).get("sha256")} == files[found.key]
    }


def fetch(run_id: str, folder: Path) -> Path:
    """Copies the model of a run to `folder` and checks each file's SHA-256. Correct existing files are kept.

    Returns the folder. Raises StoreError.
    """
    from metaflow import S3

    model = _model_artifact(run_id)
    files = model["files"]
    _prepare_folder(folder, files)
    missing = [name for name in files if name != RUN_FILE and _digest(folder / name) != files[name]]
    if missing or _digest(folder / RUN_FILE) != files[RUN_FILE]:
        (folder / RUN_FILE).unlink(missing_ok=True)  # so that the folder counts as incomplete meanwhile
        missing.append(RUN_FILE)
    with S3(s3root=model["s3"], tmproot=str(folder)) as s3:
        for name in missing:
            with _as_store_errors(f"{model['s3']}/{name}", ". Type the same command to continue"):
                copy = Path(s3.get(name).path)
            if _digest(copy) != files[name]:
                raise StoreError(
                    f"{model['s3']}/{name}: is not the file that was pushed. Fetch another run's model"
                )
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(copy, folder / name)
    return folder


def _model_artifact(run_id: str) -> dict[str, Any]:
    """The artifact `model` of a run. Raises StoreError if it was not pushed."""
    from metaflow import Run, namespace
    from metaflow.exception import MetaflowException

    namespace(None)  # runs of all users
    problems = []
    for flow in FLOWS:
        try:
            run = Run(f"{flow}/{run_id}")
            break
        except MetaflowException as error:
            problems.append(str(error))
    else:
        raise StoreError(f"run {run_id}: {problems[0]}. Type the run-id that the flow printed")
    try:
        # Of several nodes the first has it.
        model = next(task.data.model for task in run["train"] if hasattr(task.data, "model"))
    except (MetaflowException, KeyError, AttributeError, StopIteration) as error:
        step = "train" if "train" in run else "start"
        raise StoreError(
            f"run {run_id}: has no model. Type python flows/{FLOWS[flow]} logs {run_id}/{step}"
        ) from error
    if not model.get("s3"):
        raise StoreError(
            f"run {run_id}: its model is not on S3, because METAFLOW_DATATOOLS_S3ROOT was not configured. "
            f"Copy it from {model['folder']} on {model['host']}"
        )
    return model


def _prepare_folder(folder: Path, files: Mapping[str, Any]) -> None:
    """Makes the folder, and removes leftovers of a killed fetch. Raises StoreError if it holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file. Name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    left = {path for path in folder.glob(LEFTOVER) if path.is_dir() and not path.is_symlink()}
    expected = {name.partition("/")[0] for name in files}  # an adapter lies in a folder of its own
    foreign = sorted({path.name for path in folder.iterdir() if path not in left} - expected)
    if foreign:
        raise StoreError(
            f"{folder}: holds files of something else ({', '.join(foreign[:3])}). Name a new folder"
        )
    for path in left:
        shutil.rmtree(path)


def _digest(file: Path) -> dict[str, Any] | None:
    """{"size", "sha256"} of a file, None if it does not exist."""
    return file_digest(file) if file.is_file() else None


@click.command(cls=CheckedCommand)
@click.argument("run_id")
@click.option(
    "--to", "folder", required=True, type=PathName("output"), metavar="FOLDER", help="A new folder."
)
def main(run_id: str, folder: str) -> None:
    """Fetch the model of the flow's run RUN_ID to FOLDER. The same command continues an interrupted copy."""
    try:
        fetch(run_id, Path(folder))
    except ImportError:
        sys.exit(NO_METAFLOW)
    except (StoreError, OSError) as error:
        sys.exit(f"Cannot fetch: {error}")
    click.echo(
        f'{folder} holds the model. Ask it: python -m training.generate --model {shlex.quote(folder)} "Name a river."'
    )


if __name__ == "__main__":
    main()
