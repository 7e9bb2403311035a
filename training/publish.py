"""The copy of a finished model on DBFS, a Volume, S3 or in any folder: whole under its name, or visibly not yet.

    python -m training.publish --model /local_disk0/dolly --to /dbfs/dolly

DBFS and Volumes take a file from front to back and nothing else: no append, seek, link, rename or update. So:

    publishing.json       first: whose copy this will be. Gone once the copy is whole
    <every other file>    written once, read back, and its SHA-256 compared
    manifest.json         {name: {"size": bytes, "sha256": hex}} of every file but itself
    run.json              last: a folder that holds it is whole

A copy that broke off is continued by the same command.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from training.checks import free_bytes, writable
from training.consts import RUN_FILE

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MARKER_FILE = "publishing.json"
NOT_PUBLISHED = r"^\.|\.lock$|\.partial$"

BLOCK = 2**23  # bytes read and written at once
LARGE = 2**28  # bytes from which a file has a bar on a terminal, and a line in the log
MOUNTS = ("/dbfs", "/Volumes")  # of Databricks
BUCKETS = ("s3", "s3a")  # what has no folders to be made
NEW_FOLDER = "Name a new folder"


class PublishError(RuntimeError):
    """The model could not be published; the message says why and what to type. The source is untouched."""


class SourceError(PublishError):
    """A file of the model itself cannot be read, or has changed while it was copied."""


# --- the source --------------------------------------------------------------------------------------


def model_files(folder: Path) -> list[Path]:
    """What is published of a finished run: its plain files, run.json last; no checkpoints, TensorBoard runs, locks."""
    ours = (RUN_FILE, MANIFEST_FILE, MARKER_FILE)
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in ours and not re.search(NOT_PUBLISHED, file.name)
    ]
    return [*files, folder / RUN_FILE]


def _finished_record(folder: Path) -> bytes:
    """The bytes of the run's record. Raises PublishError where the run did not finish."""
    try:
        content = (folder / RUN_FILE).read_bytes()
        record = json.loads(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PublishError(
            f"{folder}: there is no {RUN_FILE}, so no run wrote its model here. Name a run's --local-output-dir"
        ) from error
    except (OSError, ValueError) as error:
        raise PublishError(f"{folder / RUN_FILE}: cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("status") != "finished":
        raise PublishError(
            f"{folder}: its training did not finish. Finish it first: the same command with --resume auto"
        )
    return content


def model_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hex}} of what is published of a finished run, run.json last.

    Raises PublishError where the run did not finish, or a weight file is not the one that training verified.
    """
    record = json.loads(_finished_record(folder))
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


# --- the target --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A folder of some file system; `shown` is how its owner wrote it."""

    fs: fsspec.AbstractFileSystem
    path: str
    shown: str
    in_bucket: bool = False

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"


def local_path(folder: str) -> Path:
    """dbfs:/x is what Databricks shows, and /dbfs/x where programs find it; taken as a path it would be `./dbfs:/x`."""
    return Path(re.sub("^dbfs:/*", "/dbfs/", folder)).expanduser()


def target_faults(target: str, folder: Path | None = None) -> list[str]:
    """Why a model could not be published to `target`, as far as can be told without writing a file; else [].

    A target that holds something is a fault, unless it is a copy, whole or begun, of the finished run in `folder`.
    """
    record = None
    if folder is not None:
        with suppress(PublishError):
            record = _finished_record(folder)
    try:
        opened = _open_target(target, folder)
        _refuse_others(opened, _listing(opened), record)
    except PublishError as error:
        return [str(error)]
    return []


def _open_target(target: str, folder: Path | None) -> Target:
    """Raises PublishError where nothing could be published to."""
    if target.startswith("dbfs:"):
        raise PublishError(f"{target}: a path is needed. Type {local_path(target)}")
    if "://" in target:
        return _open_url(target)
    path = local_path(target).absolute()
    mount = Path(*path.parts[:2])
    if str(mount) in MOUNTS and not mount.is_dir():
        # It would be made on this machine's own disk, and be lost with the machine.
        raise PublishError(f"{target}: there is no {mount} on this machine. Name another folder")
    try:
        if folder is not None and path.resolve() == folder.resolve():
            raise PublishError(f"{target}: is the local output itself. Name another folder")
        if path.exists() and not path.is_dir():
            raise PublishError(f"{target}: already holds something, being a file. {NEW_FOLDER}")
        if not writable(path):
            raise PublishError(f"{target}: cannot be written. Name a folder of your own")
    except OSError as error:  # a folder above it may not be entered, or the name is too long
        raise PublishError(
            f"{target}: cannot be written ({error.strerror}). Name a folder of your own"
        ) from error
    return Target(LocalFileSystem(), str(path), target)


def _open_url(target: str) -> Target:
    protocol = target.split("://")[0]
    if "@" in target:
        # It would stand in run.json and on the model's card.
        raise PublishError(
            f"{re.sub('//.*@', '//***@', target)}: holds a password, or another '@'. Leave it out, and give the password "
            "where the file system looks for it (for S3 in the environment, or in ~/.aws/credentials)"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        missing = "s3fs is not installed. Type pip install '.[s3]'" if protocol in BUCKETS else error
        raise PublishError(f"{target}: {missing}") from error
    except ValueError as error:
        raise PublishError(
            f"{target}: there is no file system '{protocol}'. Name a folder, or a URL such as s3://bucket/folder"
        ) from error
    with _telling(f"{target}: cannot be reached"):
        fs, path = fsspec.url_to_fs(target)
    opened = Target(fs, path.rstrip("/"), target, in_bucket=protocol in BUCKETS)
    if opened.in_bucket and not opened.path:
        raise PublishError(f"{target}: names no bucket. Type {protocol}://bucket/folder")
    return opened


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turns whatever a file system raises into a PublishError; each has exceptions of its own."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PublishError(f"{what}: no space is left there") from error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PublishError(f"{what}: {reason}") from error


def _listing(target: Target) -> dict[str, int | None]:
    """{name: bytes} of what lies in the target, None for a folder; {} where there is no target yet."""
    with _telling(f"{target.shown}: cannot be listed"):
        target.fs.invalidate_cache()
        try:
            entries = target.fs.ls(target.path, detail=True)
        except FileNotFoundError as error:
            # A cause is S3's own answer; of a folder that is not there s3fs speaks itself.
            if target.in_bucket and error.__cause__:
                bucket = target.path.split("/")[0]
                raise PublishError(f"{target.shown}: there is no bucket '{bucket}'. Make it first") from error
            return {}
    there = {}
    for entry in entries:
        name = entry["name"].rstrip("/")
        if name != target.path:  # S3's console marks a folder by an empty object of its own name
            there[name.rsplit("/", 1)[-1]] = entry["size"] if entry["type"] == "file" else None
    return there


def _marker(record: bytes) -> bytes:
    return json.dumps({f"sha256 of {RUN_FILE}": hashlib.sha256(record).hexdigest()}).encode() + b"\n"


def _refuse_others(target: Target, there: dict[str, int | None], record: bytes | None) -> None:
    """Raises PublishError unless the target is empty, or a copy, whole or begun, of the run with this record."""
    if set(there) <= {MARKER_FILE}:  # a copy that broke off at its first write has nothing to lose
        return
    reason = "already holds something"
    if record is not None:
        for name, content in ((MARKER_FILE, _marker(record)), (RUN_FILE, record)):
            if there.get(name) is not None:
                with _telling(f"{target.shown}/{name}: cannot be read"):
                    if target.fs.cat_file(target.file(name)) == content:
                        return
                reason = "already holds another run's model, or part of it"
    names = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
    raise PublishError(f"{target.shown}: {reason} ({names}). {NEW_FOLDER}")


def _refuse_lack_of_space(target: Target, needed: int) -> None:
    free = None if "://" in target.shown else free_bytes(local_path(target.shown))
    if free and free < needed:  # a mounted object store may say 0; writing to a full disk tells the truth
        raise PublishError(
            f"{target.shown}: {_shown(needed)} are needed, and {_shown(free)} are free. Make room, or name another folder"
        )


# --- publishing --------------------------------------------------------------------------------------


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
    record = _finished_record(folder)
    opened = _open_target(target, folder)
    there = _listing(opened)
    _refuse_others(opened, there, record)
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
        _write_missing(opened, there, contents, expected, missing, _marker(record))
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
        with _telling(f"{target.shown}: cannot be made"):
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
        _telling(f"{target.shown}/{name}: cannot be read"),
        target.fs.open(target.file(name), "rb") as copy,
    ):
        return _figures(_blocks(copy, size, f"{name}: reading back"))


def _remove(target: Target, name: str) -> None:
    with _telling(f"{target.shown}/{name}: cannot be removed"):
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
                _telling(f"{target.shown}/{name}: cannot be written"),
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


@click.command()
@click.option(
    "--model",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A finished run's --local-output-dir.",
)
@click.option(
    "--to",
    "target",
    required=True,
    metavar="TARGET",
    help="A new folder, /dbfs/..., /Volumes/..., or a URL such as s3://bucket/folder.",
)
def main(folder: Path, target: str) -> None:
    """Copy a finished model to TARGET, or go on with a copy that broke off."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        publish(folder.expanduser(), target)
    except PublishError as error:
        print(f"Cannot publish: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
