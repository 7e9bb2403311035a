"""The finished model of a run on S3: pushed under the run by the flow, fetched by the run's id.

    python flows/model_on_s3.py 1764229912 --to dolly       then: python -m training.generate --model dolly "..."

It lies under METAFLOW_DATATOOLS_S3ROOT/TrainDollyFlow/<run id>/. Like everywhere else, run.json comes last, so that
training.generate refuses a copy that is not whole. The artifact `model` of the run has each file's size and SHA-256.
"""

from __future__ import annotations

import os
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

FLOW = "TrainDollyFlow"
LEFTOVER = "metaflow.s3." + 8 * "[a-z0-9_]"  # S3(tmproot=...) makes its folder of copies by mkdtemp
NO_METAFLOW = "Metaflow is not installed. Type pip install '.[metaflow]'"


class StoreError(RuntimeError):
    """The model could not be pushed or fetched; the message says why and what to type."""


def root_problems() -> list[str]:
    """Why nothing could be pushed to the configured root; [] too where none is configured."""
    from metaflow.metaflow_config import DATATOOLS_CLIENT_PARAMS, DATATOOLS_S3ROOT
    from metaflow.plugins.datatools.s3.s3util import get_s3_client

    if not DATATOOLS_S3ROOT:
        return []
    from botocore.config import Config

    bucket = DATATOOLS_S3ROOT.removeprefix("s3://").split("/")[0]
    # The user's own settings, a dict until Metaflow has made its first client of them.
    config = DATATOOLS_CLIENT_PARAMS.get("config") or {}
    config = config if isinstance(config, Config) else Config(**config)
    # Metaflow's many tries are for the hours of a run; here a person waits.
    quick = config.merge(Config(connect_timeout=10, read_timeout=10, retries={"total_max_attempts": 3}))
    client, _ = get_s3_client(s3_client_params={**DATATOOLS_CLIENT_PARAMS, "config": quick})
    try:
        client.head_bucket(Bucket=bucket)
    except Exception as error:  # boto3's own: no bucket, no right, no connection
        return [
            f"METAFLOW_DATATOOLS_S3ROOT {DATATOOLS_S3ROOT}: the bucket {bucket!r} cannot be reached ({error}). "
            "Make it, or give the right to write there"
        ]
    return []


@contextmanager
def _as_store_errors(place: str, advice: str = "") -> Iterator[None]:
    """Turns Metaflow's and boto3's errors, which share no class, into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{place}: {type(error).__name__}: {error}{advice}") from error


def push(folder: Path, files: dict[str, dict[str, Any]], run: Any) -> str | None:
    """Copies a finished model's `files` ({name: {"size", "sha256"}}, of `copy.model_digests`) under the run.

    What an earlier attempt of the same run has left there is kept where it is right. Returns the URL of the folder, or
    None where no root is configured. Raises StoreError; the local model is untouched then.
    """
    from metaflow import S3, current
    from metaflow.metaflow_config import DATATOOLS_S3ROOT
    from metaflow.plugins.datatools.s3 import S3PutObject

    if not DATATOOLS_S3ROOT:
        return None
    # The folder of S3(run=run), for people.
    root = f"{DATATOOLS_S3ROOT.rstrip('/')}/{current.flow_name}/{current.run_id}"
    with _as_store_errors(root), S3(run=run) as s3:
        arrived = _right(s3, files)
        for names in (files.keys() - {RUN_FILE}, {RUN_FILE}):
            missing = sorted(names - arrived)
            objects = [
                S3PutObject(key=name, path=str(folder / name), metadata={"sha256": files[name]["sha256"]})
                for name in missing
            ]
            urls = s3.put_files(objects) if objects else []
            if len(urls) != len(missing):  # of a missing bucket it returns [], and says nothing
                raise StoreError(f"{root}: {len(urls)} of {len(missing)} files arrived")
        wrong = sorted(files.keys() - _right(s3, files))
        if wrong:
            raise StoreError(f"{root}: not there, or of another size than here: {', '.join(wrong)}")
    return root


def _right(s3: Any, files: dict[str, dict[str, Any]]) -> set[str]:
    """Which of the files lie there with their size, pushed from the same content."""
    return {
        found.key
        for found in s3.info_many(list(files), return_missing=True)
        if found.exists
        and {"size": found.size, "sha256": (found.metadata or {}).get("sha256")} == files[found.key]
    }


def fetch(run_id: str, folder: Path) -> Path:
    """Copies the model of a run to `folder`, each file compared with its SHA-256. What is there and right is kept.

    Returns the folder that holds the model. Raises StoreError.
    """
    from metaflow import S3

    model = _model_of(run_id)
    files = model["files"]
    _prepare(folder, files)
    missing = [name for name in files if name != RUN_FILE and _figures(folder / name) != files[name]]
    if missing or _figures(folder / RUN_FILE) != files[RUN_FILE]:
        (folder / RUN_FILE).unlink(missing_ok=True)  # nobody shall take for whole what is being mended
        missing.append(RUN_FILE)
    with S3(s3root=model["s3"], tmproot=str(folder)) as s3:
        for name in missing:
            with _as_store_errors(f"{model['s3']}/{name}", ". The same command goes on"):
                copy = Path(s3.get(name).path)
            if _figures(copy) != files[name]:
                raise StoreError(
                    f"{model['s3']}/{name}: is not the file that was pushed. Fetch another run's model"
                )
            os.replace(copy, folder / name)
    return folder


def _model_of(run_id: str) -> dict[str, Any]:
    """The artifact `model` of a run. Raises StoreError where it was not pushed."""
    from metaflow import Run, namespace
    from metaflow.exception import MetaflowException

    namespace(None)  # anybody's runs
    try:
        model = Run(f"{FLOW}/{run_id}")["train"].task.data.model
    except (MetaflowException, KeyError, AttributeError) as error:
        raise StoreError(
            f"run {run_id}: there is no model of it ({error}). Type python flows/train_dolly_flow.py logs {run_id}/train"
        ) from error
    if not model.get("s3"):
        raise StoreError(
            f"run {run_id}: was not pushed to S3, as no METAFLOW_DATATOOLS_S3ROOT was configured. It lies in {model['folder']} "
            f"on {model['host']}"
        )
    return model


def _prepare(folder: Path, files: Mapping[str, Any]) -> None:
    """Makes the folder, or clears a killed fetch's leftovers from it. Raises StoreError where it holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file. Name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    left = {path for path in folder.glob(LEFTOVER) if path.is_dir() and not path.is_symlink()}
    foreign = sorted({path.name for path in folder.iterdir() if path not in left} - files.keys())
    if foreign:
        raise StoreError(
            f"{folder}: holds what is not of this model ({', '.join(foreign[:3])}). Name a new folder"
        )
    for path in left:
        shutil.rmtree(path)


def _figures(file: Path) -> dict[str, Any] | None:
    """{"size", "sha256"} of a file, None where there is none."""
    return file_digest(file) if file.is_file() else None


@click.command()
@click.argument("run_id")
@click.option(
    "--to", "folder", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="A new folder."
)
def main(run_id: str, folder: Path) -> None:
    """Fetch the model of a flow's run, by its RUN_ID, to FOLDER, or go on with a copy that broke off."""
    try:
        fetch(run_id, folder.expanduser())
    except ImportError:
        sys.exit(NO_METAFLOW)
    except StoreError as error:
        sys.exit(f"Cannot fetch: {error}")
    click.echo(
        f'{folder} holds the model. Ask it: python -m training.generate --model {folder} "Name a river."'
    )


if __name__ == "__main__":
    main()
