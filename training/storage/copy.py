"""The copy of a finished model on DBFS, a Volume, S3 or in any folder: whole under its name, or visibly not yet.

    python -m training.publish --model /local_disk0/dolly --to /dbfs/dolly

DBFS and Volumes take a file from front to back and nothing else: no append, seek, link, rename or update. So:

    publishing.json       first: whose copy this will be. Gone once the copy is whole
    <every other file>    written once, read back, and its SHA-256 compared
    manifest.json         {name: {"size": bytes, "sha256": hex}} of every file but itself
    run.json              last: a folder that holds it is whole

A copy that broke off is continued by the same command."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from training.consts import RUN_FILE
from training.errors import PublishError, SourceError
from training.files import free_bytes, local_path
from training.storage.target import (
    BLOCK,
    LARGE,
    MARKER_FILE,
    NEW_FOLDER,
    Target,
    finished_record_bytes,
    listing,
    marker_of,
    open_target,
    refuse_others,
    telling,
)

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
NOT_PUBLISHED = r"^\.|\.lock$|\.partial$"


def model_files(folder: Path) -> list[Path]:
    """What is published of a finished run: its plain files, run.json last; no checkpoints, TensorBoard runs, locks."""
    ours = (RUN_FILE, MANIFEST_FILE, MARKER_FILE)
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in ours and not re.search(NOT_PUBLISHED, file.name)
    ]
    return [*files, folder / RUN_FILE]


def model_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hex}} of what is published of a finished run, run.json last.

    Raises PublishError where the run did not finish, or a weight file is not the one that training verified.
    """
    record = json.loads(finished_record_bytes(folder))
    figures = {file.name: _source_figures(file.name, file) for file in model_files(folder)}
    for name, told in record.get("weights", {}).items():
        if name not in figures or figures[name]["sha256"] != told["sha256"]:
            raise PublishError(
                f"{folder / name}: is not the file that training wrote and verified. Nothing is published; with its "
                "checkpoints there, training's command with --resume auto and another --local-output-dir makes it again"
            )
    return figures


def _open(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    with _reading(source):
        return source.open("rb")


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Tells a source that cannot be read from a target that cannot be written."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from error


def _blocks(file: IO[bytes], size: int, label: str) -> Iterator[bytes]:
    """The file front to back, with a bar where it is large and a person is looking."""
    hidden = None if size >= LARGE else True  # None: hidden unless on a terminal
    with tqdm(
        total=size, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=hidden
    ) as bar:
        while block := file.read(BLOCK):
            yield block
            bar.update(len(block))


def _figures(blocks: Iterable[bytes]) -> dict[str, Any]:
    """{"size": bytes, "sha256": hex} of a file's content."""
    size, digest = 0, hashlib.sha256()
    for block in blocks:
        size += len(block)
        digest.update(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _source_figures(name: str, source: Path | bytes) -> dict[str, Any]:
    if isinstance(source, bytes):
        return _figures([source])
    with _reading(source), _open(source) as file:
        return _figures(_blocks(file, source.stat().st_size, f"{name}: checksum"))


def _refuse_lack_of_space(target: Target, needed: int) -> None:
    free = None if "://" in target.shown else free_bytes(local_path(target.shown))
    if free and free < needed:  # a mounted object store may say 0; writing to a full disk tells the truth
        raise PublishError(
            f"{target.shown}: {_shown(needed)} are needed, and {_shown(free)} are free. Make room, or name another folder"
        )


def publish(folder: Path, target: str) -> list[str]:
    """Copies the finished model in `folder`, without its checkpoints and logs, to a folder or an fsspec URL.

    What an earlier attempt left there is kept where it is right, and written anew where it is not.

    Returns:
        The names of the files written, in that order: [] if the whole model was there already.

    Raises:
        PublishError: the run did not finish, or the target cannot be used or holds something else (told before
            anything is written); or a file could not be written, or read back wrong twice.
    """
    begin = time.monotonic()
    record = finished_record_bytes(folder)
    opened = open_target(target, folder)
    there = listing(opened)
    refuse_others(opened, there, record)
    contents: dict[str, Path | bytes] = {file.name: file for file in model_files(folder)}
    contents[RUN_FILE] = record
    foreign = [name for name in sorted(there) if name not in {*contents, MANIFEST_FILE, MARKER_FILE}]
    foreign += [name for name, size in there.items() if size is None and name not in foreign]
    if foreign:
        raise PublishError(
            f"{target}: holds what is not of this model ({', '.join(foreign)}). {NEW_FOLDER}, or move it away"
        )

    expected = model_figures(folder)
    contents[MANIFEST_FILE] = (json.dumps(expected, indent=2) + "\n").encode()
    contents[RUN_FILE] = contents.pop(RUN_FILE)  # the last to be written
    expected = {name: expected.get(name) or _source_figures(name, contents[name]) for name in contents}
    missing = [name for name in contents if not _is_there(opened, name, there, expected[name])]
    total = f"{len(contents)} files, {_shown(sum(each['size'] for each in expected.values()))}"
    if not missing:
        if MARKER_FILE in there:
            _remove(opened, MARKER_FILE)
        logger.info("%s holds this model already, whole and unchanged: %s", target, total)
        return []
    if RUN_FILE not in missing:
        missing.append(RUN_FILE)
    _refuse_lack_of_space(opened, sum(expected[name]["size"] - (there.get(name) or 0) for name in missing))
    try:
        _write_missing(opened, there, contents, expected, missing, marker_of(record))
    except PublishError as error:
        command = shlex.join(["python", "-m", "training.publish", "--model", str(folder), "--to", target])
        ours = (
            f"{folder} must stay as it is"
            if isinstance(error, SourceError)
            else f"The model in {folder} is whole"
        )
        raise PublishError(
            f"{error}. {ours}, and what was copied is kept. When the cause is mended, type {command}"
        ) from error
    logger.info("published to %s: %s, each file read back; %.0f s", target, total, time.monotonic() - begin)
    return missing


def _write_missing(
    target: Target,
    there: dict[str, int | None],
    contents: dict[str, Path | bytes],
    expected: dict[str, dict[str, Any]],
    missing: list[str],
    marker: bytes,
) -> None:
    """Marker, missing files, manifest, record: in an order that can break off anywhere and be taken up again."""
    if not target.in_bucket:
        with telling(f"{target.shown}: cannot be made"):
            target.fs.makedirs(target.path, exist_ok=True)
    marked = _source_figures(MARKER_FILE, marker)
    # A marker that is right is never written again: half a marker beside files would make them another's.
    if not _is_there(target, MARKER_FILE, there, marked):
        _write(target, MARKER_FILE, marker, marked)
    if RUN_FILE in there:
        _remove(target, RUN_FILE)  # nobody shall take for whole what is being mended
    for name in missing:
        _write(target, name, contents[name], expected[name])
    _remove(target, MARKER_FILE)


def _is_there(target: Target, name: str, there: dict[str, int | None], wanted: dict[str, Any]) -> bool:
    return there.get(name) == wanted["size"] and _target_figures(target, name, wanted["size"]) == wanted


def _target_figures(target: Target, name: str, size: int) -> dict[str, Any]:
    with (
        telling(f"{target.shown}/{name}: cannot be read"),
        target.fs.open(target.file(name), "rb") as copy,
    ):
        return _figures(_blocks(copy, size, f"{name}: reading back"))


def _remove(target: Target, name: str) -> None:
    with telling(f"{target.shown}/{name}: cannot be removed"):
        if target.fs.exists(target.file(name)):
            target.fs.rm_file(target.file(name))


def _write(target: Target, name: str, source: Path | bytes, wanted: dict[str, Any]) -> None:
    """Writes a file front to back and reads it back; a second time if that was not the same."""
    size = wanted["size"]
    for _ in range(2):
        _remove(target, name)
        begin = time.monotonic()
        try:
            with (
                telling(f"{target.shown}/{name}: cannot be written"),
                _open(source) as file,
                target.fs.open(target.file(name), "wb") as copy,
            ):
                for block in _blocks(file, size, name):
                    copy.write(block)
            seconds = time.monotonic() - begin
            if _target_figures(target, name, size) == wanted:
                if size >= LARGE:
                    speed = size / 2**20 / max(seconds, 1e-9)
                    logger.info("%s: %s at %.0f MiB/s, read back", name, _shown(size), speed)
                return
            if isinstance(source, Path) and _source_figures(name, source) != wanted:
                raise SourceError(f"{source}: has changed while it was copied")
            logger.warning("%s/%s read back otherwise than it was written", target.shown, name)
        except PublishError:
            with suppress(PublishError):
                _remove(target, name)
            raise
    _remove(target, name)
    raise PublishError(f"{target.shown}/{name}: read back otherwise than it was written, twice")


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= LARGE else f"{size / 2**20:.1f} MiB"
