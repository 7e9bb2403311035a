"""Copies a finished model to DBFS, a Volume, S3 or any folder. An incomplete copy is recognisable as such.

    python -m training.publish --model /local_disk0/dolly --to /dbfs/dolly

DBFS and Volumes support only sequential writes of new files: no append, seek, link, rename or update.
The files are therefore written in this order:

    publishing.json       first: names the run that is being copied; removed once the copy is complete
    <every other file>    written once, read back, and its SHA-256 compared
    manifest.json         {name: {"size": bytes, "sha256": hex}} of all other files
    run.json              last: a folder that has it is complete

The same command continues an interrupted copy."""

from __future__ import annotations

import io
import json
import logging
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from training.consts import RUN_FILE
from training.errors import PublishError, SourceError
from training.files import (
    LARGE,
    PARTIAL,
    digest,
    file_digest,
    free_bytes,
    local_path,
    read_blocks,
    size_in_words,
)
from training.storage.record import finished_run
from training.storage.target import (
    MARKER_FILE,
    NEW_FOLDER,
    Target,
    as_publish_error,
    check_target_contents,
    finished_record_bytes,
    list_files,
    marker_of,
    open_target,
)

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"


def model_files(folder: Path) -> list[Path]:
    """Files of a finished run to publish, run.json last: no folders (checkpoints, TensorBoard), no temporary files."""
    separate = (RUN_FILE, MANIFEST_FILE, MARKER_FILE)  # appended below, or written by `publish`
    temporary = (".lock", PARTIAL)
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in separate]
    plain = [file for file in files if not file.name.startswith(".") and not file.name.endswith(temporary)]
    return [*plain, folder / RUN_FILE]


def model_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hex}} of the files to publish, run.json last.

    Raises PublishError if the run is not finished, or a weight file differs from the one that training verified.
    """
    record = finished_run(folder)
    digests = {file.name: _source_digest(file) for file in model_files(folder)}
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
    opened = open_target(target, folder)
    existing = list_files(opened)
    check_target_contents(opened, existing, record)
    files: dict[str, Path | bytes] = {file.name: file for file in model_files(folder)[:-1]}
    _check_no_foreign_files(opened, existing, files)

    digests = model_digests(folder)
    manifest = (json.dumps(digests, indent=2) + "\n").encode()
    digests[MANIFEST_FILE] = digest([manifest])
    contents = files | {MANIFEST_FILE: manifest, RUN_FILE: record}  # in writing order
    missing = {n: source for n, source in contents.items() if not _is_copied(opened, n, existing, digests[n])}
    total = f"{len(contents)} files, {size_in_words(sum(file['size'] for file in digests.values()))}"
    if not missing:
        if MARKER_FILE in existing:
            _remove(opened, MARKER_FILE)
        logger.info("%s already holds this model, complete and unchanged: %s", target, total)
        return []
    missing[RUN_FILE] = record
    _check_free_space(opened, sum(digests[name]["size"] - (existing.get(name) or 0) for name in missing))
    try:
        _write_missing(opened, existing, missing, digests, marker_of(record))
    except PublishError as error:
        command = shlex.join(["python", "-m", "training.publish", "--model", str(folder), "--to", target])
        source_failed = isinstance(error, SourceError)
        state = (
            f"{folder} must not change during the copy"
            if source_failed
            else f"The model in {folder} is complete"
        )
        raise PublishError(
            f"{error}. {state}, and the files copied so far are kept. Fix the cause, then type {command}"
        ) from error
    logger.info("published to %s: %s, each file read back; %.0f s", target, total, time.monotonic() - start)
    return list(missing)


def _check_no_foreign_files(target: Target, existing: Mapping[str, int | None], files: Iterable[str]) -> None:
    allowed = {*files, RUN_FILE, MANIFEST_FILE, MARKER_FILE}
    foreign = sorted(name for name, size in existing.items() if name not in allowed or size is None)
    if foreign:
        raise PublishError(
            f"{target.name}: holds files that are not part of this model ({', '.join(foreign)}). "
            f"{NEW_FOLDER}, or move them away"
        )


def _check_free_space(target: Target, needed: int) -> None:
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
    # Never rewrite a correct marker: if that write broke off, the files would look like those of another run.
    if not _is_copied(target, MARKER_FILE, existing, digest([marker])):
        _write(target, MARKER_FILE, marker, digest([marker]))
    if RUN_FILE in existing:
        _remove(target, RUN_FILE)  # an incomplete copy must not look complete
    for name, source in missing.items():
        _write(target, name, source, digests[name])
    _remove(target, MARKER_FILE)


def _write(target: Target, name: str, source: Path | bytes, expected: dict[str, Any]) -> None:
    """Writes a file sequentially and reads it back. Tries once more if the bytes differ."""
    size = expected["size"]
    try:
        for _ in range(2):
            _remove(target, name)
            start = time.monotonic()
            with (
                as_publish_error(f"{target.name}/{name}: cannot be written"),
                _open(source) as file,
                target.fs.open(target.file(name), "wb") as copy,
            ):
                for block in read_blocks(file, size, name):
                    copy.write(block)
            seconds = time.monotonic() - start
            if _target_digest(target, name, size) == expected:
                if size >= LARGE:
                    speed = size / 2**20 / max(seconds, 1e-9)
                    logger.info("%s: %s at %.0f MiB/s, read back", name, size_in_words(size), speed)
                return
            if isinstance(source, Path) and _source_digest(source) != expected:
                raise SourceError(f"{source}: changed while it was copied")
            logger.warning("%s/%s: the bytes read back differ from the bytes written", target.name, name)
        raise PublishError(f"{target.name}/{name}: the bytes read back differ from the bytes written, twice")
    except PublishError:
        with suppress(PublishError):
            _remove(target, name)
        raise


def _remove(target: Target, name: str) -> None:
    with as_publish_error(f"{target.name}/{name}: cannot be removed"):
        if target.fs.exists(target.file(name)):
            target.fs.rm_file(target.file(name))


def _is_copied(
    target: Target, name: str, existing: Mapping[str, int | None], expected: dict[str, Any]
) -> bool:
    size = expected["size"]
    return existing.get(name) == size and _target_digest(target, name, size) == expected


def _target_digest(target: Target, name: str, size: int) -> dict[str, Any]:
    with (
        as_publish_error(f"{target.name}/{name}: cannot be read"),
        target.fs.open(target.file(name), "rb") as copy,
    ):
        return digest(read_blocks(copy, size, f"{name}: reading back"))


def _source_digest(file: Path) -> dict[str, Any]:
    with _source_errors(file):
        return file_digest(file, f"{file.name}: checksum")


def _open(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    with _source_errors(source):
        return source.open("rb")


@contextmanager
def _source_errors(source: Path) -> Iterator[None]:
    """Turns OSError into SourceError, to tell an unreadable source from an unwritable target."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from error
