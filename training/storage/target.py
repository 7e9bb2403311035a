"""A folder on DBFS, a Volume, S3 or a local disk that a finished model can be published to."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from training.consts import RUN_FILE
from training.errors import PublishError
from training.files import local_path, mounted_store, writable

MARKER_FILE = "publishing.json"
BLOCK = 2**23  # bytes read and written at once
LARGE = 2**28  # bytes from which a file has a bar on a terminal, and a line in the log
BUCKETS = ("s3", "s3a")  # what has no folders to be made
NEW_FOLDER = "Name a new folder"


def finished_record_bytes(folder: Path) -> bytes:
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


@dataclass(frozen=True)
class Target:
    """A folder of some file system; `shown` is how its owner wrote it."""

    fs: fsspec.AbstractFileSystem
    path: str
    shown: str
    in_bucket: bool = False

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"


def target_problems(target: str, folder: Path | None = None) -> list[str]:
    """Why a model could not be published to `target`, as far as can be told without writing a file; else [].

    A target that holds something is a fault, unless it is a copy, whole or begun, of the finished run in `folder`.
    """
    record = None
    if folder is not None:
        with suppress(PublishError):
            record = finished_record_bytes(folder)
    try:
        opened = open_target(target, folder)
        refuse_others(opened, listing(opened), record)
    except PublishError as error:
        return [str(error)]
    return []


def open_target(target: str, folder: Path | None) -> Target:
    """Raises PublishError where nothing could be published to."""
    if target.startswith("dbfs:"):
        raise PublishError(f"{target}: a path is needed. Type {local_path(target)}")
    if "://" in target:
        return _open_url(target)
    path = local_path(target).absolute()
    mount = mounted_store(path)
    if mount and not mount.is_dir():
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
    with telling(f"{target}: cannot be reached"):
        fs, path = fsspec.url_to_fs(target)
    opened = Target(fs, path.rstrip("/"), target, in_bucket=protocol in BUCKETS)
    if opened.in_bucket and not opened.path:
        raise PublishError(f"{target}: names no bucket. Type {protocol}://bucket/folder")
    return opened


@contextmanager
def telling(what: str) -> Iterator[None]:
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


def listing(target: Target) -> dict[str, int | None]:
    """{name: bytes} of what lies in the target, None for a folder; {} where there is no target yet."""
    with telling(f"{target.shown}: cannot be listed"):
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


def marker_of(record: bytes) -> bytes:
    return json.dumps({f"sha256 of {RUN_FILE}": hashlib.sha256(record).hexdigest()}).encode() + b"\n"


def refuse_others(target: Target, there: dict[str, int | None], record: bytes | None) -> None:
    """Raises PublishError unless the target is empty, or a copy, whole or begun, of the run with this record."""
    if set(there) <= {MARKER_FILE}:  # a copy that broke off at its first write has nothing to lose
        return
    reason = "already holds something"
    if record is not None:
        for name, content in ((MARKER_FILE, marker_of(record)), (RUN_FILE, record)):
            if there.get(name) is not None:
                with telling(f"{target.shown}/{name}: cannot be read"):
                    if target.fs.cat_file(target.file(name)) == content:
                        return
                reason = "already holds another run's model, or part of it"
    names = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
    raise PublishError(f"{target.shown}: {reason} ({names}). {NEW_FOLDER}")
