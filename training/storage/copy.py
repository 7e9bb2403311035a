"""Copies a finished model to DBFS, a Volume, S3, the Hub or any folder. An incomplete copy is recognisable as such.

    python -m training.publish --model /local_disk0/dolly --to /dbfs/dolly

DBFS and Volumes support only sequential writes of new files: no append, seek, link, rename or update.
The files are therefore written in this order:

    publishing.json       first: names the run that is being copied; removed once the copy is complete
    <every other file>    written once, read back, and its SHA-256 compared; those of an adapter in adapter/
    manifest.json         {name: {"size": bytes, "sha256": hex}} of all other files
    run.json              last: a folder that has it is complete

The same command continues an interrupted copy. hub.py writes to the Hub in the same order, in commits."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.consts import ADAPTER_FOLDER, RUN_FILE
from training.errors import PublishError, SourceError, UnfinishedRunError
from training.files import (
    PARTIAL,
    digest,
    free_bytes,
    local_path,
    size_in_words,
)
from training.storage import hub
from training.storage.record import finished_run
from training.storage.source import source_digest
from training.storage.target import (
    MARKER_FILE,
    NEW_FOLDER,
    Target,
    as_publish_error,
    list_files,
    open_target,
    try_writing,
)
from training.storage.write import remove_file, target_digest, write_checked

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
Opened = Target | hub.Repository


def finished_record_bytes(folder: Path) -> bytes:
    """Content of run.json of a finished run. Raises UnfinishedRunError if the folder holds no finished run."""
    finished_run(folder)
    return (folder / RUN_FILE).read_bytes()


def target_problems(target: str, folder: Path | None = None) -> list[str]:
    """Reasons why a model cannot be published to `target`; [] if there are none.

    The target must be empty or a copy, complete or not, of the finished run in `folder`. An empty one is tried: a small
    file is written there and removed, because only the file system knows what it allows. On the Hub, a missing
    repository is created.
    """
    record = None
    if folder is not None:
        with suppress(UnfinishedRunError):
            record = finished_record_bytes(folder)
    try:
        opened = _open(target, folder)
        existing = _listed(opened)
        check_target_contents(opened, existing, record)
        if isinstance(opened, hub.Repository):
            hub.check_permission(opened)
        elif not existing and "://" in target:  # `open_target` has tried a local folder
            try_writing(opened)
    except PublishError as error:
        return [str(error)]
    return []


def marker_of(record: bytes) -> bytes:
    """Content of the marker file in a copy of the run with this run.json."""
    return json.dumps({f"sha256 of {RUN_FILE}": digest([record])["sha256"]}).encode() + b"\n"


def _open(target: str, folder: Path | None) -> Opened:
    return hub.open_repository(target) if hub.is_hub(target) else open_target(target, folder)


def check_target_contents(target: Opened, existing: dict[str, int | None], record: bytes | None) -> None:
    """Raises PublishError unless the target is empty, or a copy, complete or not, of the run with this run.json.

    `existing` comes from `_listed`.
    """
    if set(existing) <= {MARKER_FILE}:  # interrupted at its first write: nothing can be lost
        return
    reason = "already holds something"
    if record is not None:
        for name, content in ((MARKER_FILE, marker_of(record)), (RUN_FILE, record)):
            if existing.get(name) is not None:
                if _is_copied(target, name, existing, content, digest([content])):
                    return
                reason = "already holds another run's model, or part of it"
    names = ", ".join(sorted(existing)[:3]) + (", ..." if len(existing) > 3 else "")
    raise PublishError(f"{target.name}: {reason} ({names}). {_another(target)}")


def _another(target: Opened) -> str:
    return "Name a new repository" if isinstance(target, hub.Repository) else NEW_FOLDER


def model_files(folder: Path) -> list[Path]:
    """Files of a finished run to publish, run.json last: those of the model and of its adapter.

    No other folders (checkpoints, TensorBoard), and no temporary files.
    """
    separate = (RUN_FILE, MANIFEST_FILE, MARKER_FILE)  # appended below, or written by `publish`
    temporary = (".lock", PARTIAL)
    entries = [*sorted(folder.iterdir()), *sorted((folder / ADAPTER_FOLDER).glob("*"))]
    files = [file for file in entries if file.is_file() and file.name not in separate]
    plain = [file for file in files if not file.name.startswith(".") and not file.name.endswith(temporary)]
    return [*plain, folder / RUN_FILE]


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _listed(target: Opened) -> dict[str, int | None]:
    """`list_files` of the target, with the files of its adapter."""
    if isinstance(target, hub.Repository):
        return {name: file.size for name, file in target.files.items()}
    existing = list_files(target)
    has_adapter = ADAPTER_FOLDER in existing and existing[ADAPTER_FOLDER] is None  # a folder has no size
    if not has_adapter:
        return existing
    del existing[ADAPTER_FOLDER]
    inside = list_files(replace(target, path=target.file(ADAPTER_FOLDER)))
    return existing | {f"{ADAPTER_FOLDER}/{name}": size for name, size in inside.items()}


def model_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hex}} of the files to publish, run.json last.

    Raises PublishError if the run is not finished, or a weight file differs from the one that training verified.
    """
    record = finished_run(folder)
    digests = {_name(file, folder): source_digest(file) for file in model_files(folder)}
    for name, verified in record.get("weights", {}).items():
        if name not in digests or digests[name]["sha256"] != verified["sha256"]:
            raise PublishError(
                f"{folder / name}: differs from the file that training wrote and verified. Nothing was published. "
                "To write it again from the checkpoints, type the training command with --resume auto and another "
                "--local-output-dir"
            )
    return digests


def publish(folder: Path, target: str) -> list[str]:
    """Copies the finished model in `folder`, without its checkpoints and logs, to a folder or an fsspec URL.

    Correct files of an earlier attempt are kept; wrong ones are written again.

    Returns:
        Names of the files written, in order; [] if the target already had the complete model.

    Raises:
        PublishError: before anything is written, if the run is not finished or the target is unusable or holds other
            files; later, if a file cannot be written or its read-back differs twice.
    """
    start = time.monotonic()
    record = finished_record_bytes(folder)
    if hub.is_hub(target):
        hub.repository_id(target)  # the name itself is wrong: the same command would not help
    with _with_advice(folder, target) if hub.is_hub(target) else nullcontext():
        opened = _open(target, folder)
    files: dict[str, Path | bytes] = {_name(file, folder): file for file in model_files(folder)[:-1]}

    def check() -> dict[str, int | None]:
        existing = _listed(opened)
        check_target_contents(opened, existing, record)
        _check_no_foreign_files(opened, existing, files)
        return existing

    existing = check()
    digests = model_digests(folder)
    manifest = (json.dumps(digests, indent=2) + "\n").encode()
    digests[MANIFEST_FILE] = digest([manifest])
    contents = files | {MANIFEST_FILE: manifest, RUN_FILE: record}  # in writing order
    missing = {
        n: source for n, source in contents.items() if not _is_copied(opened, n, existing, source, digests[n])
    }
    total = f"{len(contents)} files, {size_in_words(sum(file['size'] for file in digests.values()))}"
    if not missing:
        if MARKER_FILE in existing:
            if isinstance(opened, hub.Repository):
                hub.remove_file(opened, MARKER_FILE)
            else:
                remove_file(opened, MARKER_FILE)
        logger.info("%s already holds this model, complete and unchanged: %s", target, total)
        return []
    missing[RUN_FILE] = record
    _check_free_space(opened, sum(digests[name]["size"] - (existing.get(name) or 0) for name in missing))
    how = "each file read back"
    with _with_advice(folder, target, ", and the files copied so far are kept"):
        if isinstance(opened, hub.Repository):
            hub.upload(opened, contents, digests, marker_of(record), check)
            how = f"each file compared with the Hub's checksum, {'private' if opened.private else 'public'}"
        else:
            _write_missing(opened, existing, missing, digests, marker_of(record))
    logger.info("published to %s: %s, %s; %.0f s", target, total, how, time.monotonic() - start)
    return list(missing)


@contextmanager
def _with_advice(folder: Path, target: str, kept: str = "") -> Iterator[None]:
    """Adds to the error of a target that the model is safe, and what to type."""
    try:
        yield
    except PublishError as error:
        command = shlex.join(["python", "-m", "training.publish", "--model", str(folder), "--to", target])
        source_failed = isinstance(error, SourceError)
        state = (
            f"{folder} must not change during the copy"
            if source_failed
            else f"The model in {folder} is complete"
        )
        raise PublishError(f"{error}. {state}{kept}. Fix the cause, then type {command}") from error


def _check_no_foreign_files(target: Opened, existing: Mapping[str, int | None], files: Iterable[str]) -> None:
    allowed = {*files, RUN_FILE, MANIFEST_FILE, MARKER_FILE}
    foreign = sorted(name for name, size in existing.items() if name not in allowed or size is None)
    if foreign:
        raise PublishError(
            f"{target.name}: holds files that are not part of this model ({', '.join(foreign)}). "
            f"{_another(target)}, or move them away"
        )


def _check_free_space(target: Opened, needed: int) -> None:
    free = None if "://" in target.name else free_bytes(local_path(target.name))
    if free and free < needed:  # a mounted object store may report 0; then only a write can tell
        raise PublishError(
            f"{target.name}: {size_in_words(needed)} are needed, but {size_in_words(free)} are free. "
            "Make room, or name another folder"
        )


def _write_missing(
    target: Target,
    existing: Mapping[str, int | None],
    missing: Mapping[str, Path | bytes],
    digests: Mapping[str, dict[str, Any]],
    marker: bytes,
) -> None:
    """Writes marker, missing files, manifest and record, in an order that can be continued after any interruption."""
    if not target.in_bucket:
        with as_publish_error(f"{target.name}: cannot be created"):
            target.fs.makedirs(target.path, exist_ok=True)
            if any(name.startswith(f"{ADAPTER_FOLDER}/") for name in missing):
                target.fs.makedirs(target.file(ADAPTER_FOLDER), exist_ok=True)
    # Never rewrite a correct marker: if that write broke off, the files would look like those of another run.
    marked = digest([marker])
    if not _is_copied(target, MARKER_FILE, existing, marker, marked):
        write_checked(target, MARKER_FILE, marker, marked)
    if RUN_FILE in existing:
        remove_file(target, RUN_FILE)  # an incomplete copy must not look complete
    for name, source in missing.items():
        write_checked(target, name, source, digests[name])
    remove_file(target, MARKER_FILE)


def _is_copied(
    target: Opened,
    name: str,
    existing: Mapping[str, int | None],
    source: Path | bytes,
    expected: dict[str, Any],
) -> bool:
    if isinstance(target, hub.Repository):
        return hub.holds(target, name, source, expected)
    size = expected["size"]
    return existing.get(name) == size and target_digest(target, name, size) == expected
