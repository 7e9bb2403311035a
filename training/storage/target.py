"""A target of copies: a folder on DBFS, a Volume, S3 or a local disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from training.errors import PublishError, install_extra, text_of
from training.files import local_path, mounted_store, writable

MARKER_FILE = "publishing.json"
BUCKETS = ("s3", "s3a")  # protocols of object stores, which have no folders
NEW_FOLDER = "Name a new folder"
NEW_TARGET = "Name a folder, or a URL such as s3://bucket/folder"


@dataclass(frozen=True)
class Target:
    """A folder in a file system. `name` is the target as the user typed it."""

    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    in_bucket: bool = False

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"


def try_writing(target: Target) -> None:
    """Writes a small file to the target and removes it. Raises PublishError if that is not possible."""
    file = target.file(MARKER_FILE)  # if it cannot be removed, the target still counts as empty
    with as_publish_error(f"{target.name}: cannot be written"):
        try:
            if not target.in_bucket:
                target.fs.makedirs(target.path, exist_ok=True)
            with target.fs.open(file, "wb") as stream:
                stream.write(b"\n")
            target.fs.rm_file(file)
        except NotImplementedError as error:
            raise PublishError(f"{target.name}: its file system cannot write files. {NEW_TARGET}") from error


def open_target(target: str, folder: Path | None) -> Target:
    """Opens the target for the model in `folder`. Raises PublishError if it cannot be used."""
    if target.startswith("dbfs:"):
        raise PublishError(f"{target}: is a URL, but a path is needed. Type {local_path(target)}")
    if short := re.match("(hf|s3a?):(?!//)/?", target, re.IGNORECASE):
        url = f"{short[1].lower()}://{target[short.end() :]}"
        raise PublishError(
            f"{without_secret(target)}: would be a folder on this machine. Type {without_secret(url)}"
        )
    is_local = re.match("(file|local)://", target)
    if "://" in target and not is_local:
        return _open_url(target)
    path = local_path(target[is_local.end() :] if is_local else target).absolute()
    mount = mounted_store(path)
    if mount and not mount.is_dir():
        # Without the mount, the folder would land on the local disk and be lost with the machine.
        raise PublishError(f"{target}: there is no {mount} on this machine. Name another folder")
    try:
        if folder is not None and path.resolve() == folder.resolve():
            raise PublishError(f"{target}: is the run's own output folder. Name another folder")
        if path.exists() and not path.is_dir():
            raise PublishError(f"{target}: already holds something: it is a file. {NEW_FOLDER}")
        if not writable(path):
            raise PublishError(f"{target}: cannot be written. Name a folder of your own")
    except OSError as error:  # a parent folder without permission, or a name that is too long
        raise PublishError(
            f"{target}: cannot be written ({error.strerror}). Name a folder of your own"
        ) from error
    return Target(LocalFileSystem(), str(path), target)


def _open_url(target: str) -> Target:
    protocol = target.split("://")[0]
    if protocol.lower() == "hf":
        raise PublishError(
            f"{without_secret(target)}: is on the Hub, which takes finished models only. {NEW_TARGET}"
        )
    if "@" in target:
        # The password would end up in run.json and in the model card.
        raise PublishError(
            f"{without_secret(target)}: holds a password, or another '@'. Leave it out, and put it "
            "where the file system looks for it (for S3: environment variables or ~/.aws/credentials)"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        missing = f"s3fs is not installed. Type {install_extra('s3')}" if protocol in BUCKETS else error
        raise PublishError(f"{target}: {missing}") from error
    except ValueError as error:
        raise PublishError(f"{target}: there is no file system '{protocol}'. {NEW_TARGET}") from error
    with as_publish_error(f"{target}: cannot be reached"):
        fs, path = fsspec.url_to_fs(target)
    if isinstance(fs, MemoryFileSystem):
        raise PublishError(
            f"{target}: is in the memory of this process, and would be lost with it. {NEW_TARGET}"
        )
    opened = Target(fs, path.rstrip("/"), target, in_bucket=protocol in BUCKETS)
    if opened.in_bucket and not opened.path:
        raise PublishError(f"{target}: names no bucket. Type {protocol}://bucket/folder")
    return opened


def without_secret(url: str) -> str:
    """A typed URL without passwords and tokens: what stands before '@' or behind '?', and tokens of the Hub."""
    return re.sub(r"hf_\w{16,}", "hf_***", re.sub(r"\?.*", "?***", re.sub("//.*@", "//***@", url)))


@contextmanager
def as_publish_error(problem: str) -> Iterator[None]:
    """Turns any exception of a file system into PublishError: each file system has its own types."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or text_of(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left there"
        raise PublishError(f"{problem}: {reason}") from error


def list_files(target: Target) -> dict[str, int | None]:
    """{name: bytes} of the files in the target; None for a folder. {} if the target does not exist."""
    with as_publish_error(f"{target.name}: cannot be listed"):
        target.fs.invalidate_cache()
        try:
            entries = target.fs.ls(target.path, detail=True)
        except NotImplementedError as error:
            raise PublishError(f"{target.name}: its file system cannot list files. {NEW_TARGET}") from error
        except FileNotFoundError as error:
            # With a cause, S3 itself reported a missing bucket. Without one, s3fs reports a missing folder.
            if target.in_bucket and error.__cause__:
                bucket = target.path.split("/")[0]
                raise PublishError(f"{target.name}: there is no bucket '{bucket}'. Make it first") from error
            return {}
    # The S3 console marks a folder with an empty object of the same name.
    entries = [entry for entry in entries if entry["name"].rstrip("/") != target.path]
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] if entry["type"] == "file" else None
        for entry in entries
    }
