"""Copies a finished model to DBFS, a Volume, S3 or any folder. The copy is complete under its name, or visibly not yet.

    python -m training.publish --model /local_disk0/dolly --to /dbfs/dolly

DBFS and Volumes take a file from front to back and nothing else: no append, seek, link, rename or update. So:

    publishing.json       first: whose copy this will be; removed once the copy is complete
    <every other file>    written once, read back, and its SHA-256 compared
    manifest.json         {name: {"size": bytes, "sha256": hex}} of every file but itself
    run.json              last: a folder that holds it is complete

The same command continues a copy that broke off."""

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
    finished_record_bytes,
    listing,
    marker_of,
    open_target,
    refuse_others,
)

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"


def model_files(folder: Path) -> list[Path]:
    """What is published of a finished run: its plain files, run.json last; no checkpoints, TensorBoard runs, locks."""
    ours = (RUN_FILE, MANIFEST_FILE, MARKER_FILE)  # written by themselves, the record last
    passing = (".lock", PARTIAL)
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in ours]
    plain = [file for file in files if not file.name.startswith(".") and not file.name.endswith(passing)]
    return [*plain, folder / RUN_FILE]


def model_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hex}} of what is published of a finished run, run.json last.

    Raises PublishError where the run did not finish, or a weight file is not the one that training verified.
    """
    record = finished_run(folder)
    figures = {file.name: _source_figures(file) for file in model_files(folder)}
    for name, verified in record.get("weights", {}).items():
        if name not in figures or figures[name]["sha256"] != verified["sha256"]:
            raise PublishError(
                f"{folder / name}: is not the file that training wrote and verified. Nothing is published; with its "
                "checkpoints there, training's command with --resume auto and another --local-output-dir makes it again"
            )
    return figures


def publish(folder: Path, target: str) -> list[str]:
    """Copies the finished model in `folder`, without its checkpoints and logs, to a folder or an fsspec URL.

    Files that an earlier attempt left there are kept where they are right, and written anew where they are not.

    Returns:
        The names of the files written, in that order: [] if the whole model was there already.

    Raises:
        PublishError: the run did not finish, or the target cannot be used or holds something else (reported before
            anything is written); or a file could not be written, or read back wrong twice.
    """
    begin = time.monotonic()
    record = finished_record_bytes(folder)
    opened = open_target(target, folder)
    existing = listing(opened)
    refuse_others(opened, existing, record)
    files: dict[str, Path | bytes] = {file.name: file for file in model_files(folder)[:-1]}
    _refuse_foreign(opened, existing, files)

    figures = model_figures(folder)
    manifest = (json.dumps(figures, indent=2) + "\n").encode()
    figures[MANIFEST_FILE] = digest([manifest])
    contents = files | {MANIFEST_FILE: manifest, RUN_FILE: record}  # in the order of writing
    missing = {n: source for n, source in contents.items() if not _is_there(opened, n, existing, figures[n])}
    total = f"{len(contents)} files, {size_in_words(sum(file['size'] for file in figures.values()))}"
    if not missing:
        if MARKER_FILE in existing:
            _remove(opened, MARKER_FILE)
        logger.info("%s holds this model already, whole and unchanged: %s", target, total)
        return []
    missing[RUN_FILE] = record
    _refuse_lack_of_space(opened, sum(figures[name]["size"] - (existing.get(name) or 0) for name in missing))
    try:
        _write_missing(opened, existing, missing, figures, marker_of(record))
    except PublishError as error:
        command = shlex.join(["python", "-m", "training.publish", "--model", str(folder), "--to", target])
        changed = isinstance(error, SourceError)
        kept = f"{folder} must stay as it is" if changed else f"The model in {folder} is whole"
        raise PublishError(
            f"{error}. {kept}, and what was copied is kept. When the cause is mended, type {command}"
        ) from error
    logger.info("published to %s: %s, each file read back; %.0f s", target, total, time.monotonic() - begin)
    return list(missing)


def _refuse_foreign(target: Target, existing: Mapping[str, int | None], ours: Iterable[str]) -> None:
    ours = {*ours, RUN_FILE, MANIFEST_FILE, MARKER_FILE}
    foreign = sorted(name for name, size in existing.items() if name not in ours or size is None)
    if foreign:
        raise PublishError(
            f"{target.name}: holds what is not of this model ({', '.join(foreign)}). {NEW_FOLDER}, or move it away"
        )


def _refuse_lack_of_space(target: Target, needed: int) -> None:
    free = None if "://" in target.name else free_bytes(local_path(target.name))
    if free and free < needed:  # a mounted object store may say 0; writing to a full disk tells the truth
        raise PublishError(
            f"{target.name}: {size_in_words(needed)} are needed, and {size_in_words(free)} are free. "
            "Make room, or name another folder"
        )


def _write_missing(
    target: Target,
    existing: Mapping[str, int | None],
    missing: Mapping[str, Path | bytes],
    figures: Mapping[str, dict[str, Any]],
    marker: bytes,
) -> None:
    """Marker, missing files, manifest, record: in an order that can break off anywhere and be continued."""
    if not target.in_bucket:
        with as_publish_error(f"{target.name}: cannot be made"):
            target.fs.makedirs(target.path, exist_ok=True)
    # A right marker is never written again: half a marker beside files would make them another run's.
    if not _is_there(target, MARKER_FILE, existing, digest([marker])):
        _write(target, MARKER_FILE, marker, digest([marker]))
    if RUN_FILE in existing:
        _remove(target, RUN_FILE)  # an incomplete copy must not look complete
    for name, source in missing.items():
        _write(target, name, source, figures[name])
    _remove(target, MARKER_FILE)


def _write(target: Target, name: str, source: Path | bytes, wanted: dict[str, Any]) -> None:
    """Writes a file front to back and reads it back; a second time if that was not the same."""
    size = wanted["size"]
    try:
        for _ in range(2):
            _remove(target, name)
            begin = time.monotonic()
            with (
                as_publish_error(f"{target.name}/{name}: cannot be written"),
                _open(source) as file,
                target.fs.open(target.file(name), "wb") as copy,
            ):
                for block in read_blocks(file, size, name):
                    copy.write(block)
            seconds = time.monotonic() - begin
            if _figures(target, name, size) == wanted:
                if size >= LARGE:
                    speed = size / 2**20 / max(seconds, 1e-9)
                    logger.info("%s: %s at %.0f MiB/s, read back", name, size_in_words(size), speed)
                return
            if isinstance(source, Path) and _source_figures(source) != wanted:
                raise SourceError(f"{source}: has changed while it was copied")
            logger.warning("%s/%s read back otherwise than it was written", target.name, name)
        raise PublishError(f"{target.name}/{name}: read back otherwise than it was written, twice")
    except PublishError:
        with suppress(PublishError):
            _remove(target, name)
        raise


def _remove(target: Target, name: str) -> None:
    with as_publish_error(f"{target.name}/{name}: cannot be removed"):
        if target.fs.exists(target.file(name)):
            target.fs.rm_file(target.file(name))


def _is_there(target: Target, name: str, existing: Mapping[str, int | None], wanted: dict[str, Any]) -> bool:
    return existing.get(name) == wanted["size"] and _figures(target, name, wanted["size"]) == wanted


def _figures(target: Target, name: str, size: int) -> dict[str, Any]:
    with (
        as_publish_error(f"{target.name}/{name}: cannot be read"),
        target.fs.open(target.file(name), "rb") as copy,
    ):
        return digest(read_blocks(copy, size, f"{name}: reading back"))


def _source_figures(file: Path) -> dict[str, Any]:
    with _reading(file):
        return file_digest(file, f"{file.name}: checksum")


def _open(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    with _reading(source):
        return source.open("rb")


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Distinguishes a source that cannot be read from a target that cannot be written."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from error
