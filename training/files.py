"""Files and folders: atomic writes, free space, locks, one writer per folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from training.errors import FolderBusyError

logger = logging.getLogger(__name__)

MOUNTS = ("/dbfs", "/Volumes")  # of Databricks: a file is written front to back there, and never changed


def disk_problems(needs: Mapping[Path, int], labels: Mapping[Path, str]) -> list[str]:
    """File systems with less free than will be written on them.

    Args:
        needs: bytes that will be written below each path, which need not exist yet.
        labels: what they are for, as in {Path("/disk/out/checkpoints"): "2 checkpoints"}.
    """
    by_device: dict[int, list[Path]] = {}
    for path in needs:
        by_device.setdefault(nearest_existing(path).stat().st_dev, []).append(path)
    problems = []
    for paths in by_device.values():
        needed, free = sum(needs[path] for path in paths), free_bytes(paths[0])
        if free is None or needed <= free:
            continue
        purposes = ", ".join(f"{size_in_words(needs[path])} for {labels[path]} ({path})" for path in paths)
        problems.append(
            f"{_mount_point(paths[0])} has {size_in_words(free)} free, and {size_in_words(needed)} are needed: {purposes}. "
            f"Free {size_in_words(needed - free)} there, lower --save-total-limit, or use a larger disk "
            "(--local-output-dir, and HF_HOME for what is downloaded)"
        )
    return problems


def free_bytes(path: Path) -> int | None:
    """Bytes that we may still write on the file system of `path`, which need not exist yet.

    None where the answer cannot be trusted: object stores mounted as folders report no size at all, or more free
    than there is.
    """
    try:
        told = os.statvfs(nearest_existing(path))
    except OSError:
        return None
    if told.f_blocks <= 0 or not 0 <= told.f_bavail <= told.f_blocks:
        return None
    return told.f_bavail * (told.f_frsize or told.f_bsize)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists and can be looked at."""
    path = path.absolute()
    while path != path.parent:
        with contextlib.suppress(OSError):
            if path.exists():
                return path
        path = path.parent
    return path


TRACE = ".dolly-"  # how the names of what is made for a trial begin; a killed process leaves it, and it holds nothing


def writable(folder: Path) -> bool:
    """Whether `folder` can be made, or written: tried in its nearest parent that exists.

    Permissions alone tell too little: root has them all, also where NFS or /proc let nobody make anything.
    """
    try:
        if any(part.is_symlink() and not part.exists() for part in (folder, *folder.parents)):
            return False  # a link to nowhere: nothing can be made in its place
        trial = nearest_existing(folder) / f"{TRACE}trial-{os.getuid()}"
        # One name for all of a user: what a killed trial left is taken away by the next; the other ranks try it at this
        # moment. Another user's cannot be taken away in a shared folder, as /tmp is.
        with contextlib.suppress(FileExistsError):
            trial.mkdir()
        with contextlib.suppress(FileNotFoundError):
            trial.rmdir()
    except OSError:
        return False
    return True


def _mount_point(path: Path) -> Path:
    path = nearest_existing(path).resolve()
    while path != path.parent and path.parent.stat().st_dev == path.stat().st_dev:
        path = path.parent
    return path


def size_in_words(count: int) -> str:
    """Bytes as "12.3 GiB", or as MiB below a tenth of one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


WRITER_LOCK = ".writer.lock"
WRITER_INFO = ".writer.json"
WRITER_FILES = (WRITER_LOCK, WRITER_INFO)  # what a killed run leaves beside its own files

# How file systems say that they have no locks: NFS without its lock daemon, Lustre mounted without flock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def system_lock(file: Path, patience: float = -1) -> AbstractContextManager[Any] | None:
    """Takes a lock that the system takes back from a dead process, however it died; leaving the context releases it.

    None where the file system has no locks. Raises filelock.Timeout where another process holds it for `patience`
    seconds; -1: waits for ever.
    """
    from filelock import FileLock

    try:
        # Without locks of the system filelock would fall back to a file that outlives a killed process.
        return FileLock(file, fallback_to_soft=False).acquire(timeout=patience)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if need be) as its only writer; one rank of a run does. Raises FolderBusyError.

    Nothing is left to clean up by hand, however the process ends.
    """
    from filelock import Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = system_lock(folder / WRITER_LOCK, patience=0)
    except Timeout as error:
        raise FolderBusyError(_who_writes(folder)) from error
    if held is None:
        logger.warning(
            "%s: its file system has no locks, so nothing stops a second run from writing into it. Start only one",
            folder,
        )
        yield
        return
    with held:
        try:
            with contextlib.suppress(OSError):  # it only tells others who we are
                (folder / WRITER_INFO).write_text(
                    json.dumps(
                        {
                            "pid": os.getpid(),
                            "host": socket.gethostname(),
                            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                        }
                    )
                )
            yield
        finally:
            # Both go while the lock is held; filelock never takes a lock on a file that has lost its name.
            for name in WRITER_FILES[::-1]:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _who_writes(folder: Path) -> str:
    try:
        info = json.loads((folder / WRITER_INFO).read_text())
        who = f"process {info['pid']} on {info['host']}, since {info['since']}"
        stop = f"stop it (kill {info['pid']} on {info['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        who, stop = "it has not said which", "stop it"
    return (
        f"{folder}: another run is writing into it ({who}). "
        f"Wait until it has ended, {stop}, or name another --local-output-dir"
    )


def write_json(file: Path, content: Any) -> None:
    """Replaces a JSON file in one rename, so that no reader ever sees half of one."""
    partial = file.with_name(f"{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def local_path(folder: str) -> Path:
    """dbfs:/x is what Databricks shows, and /dbfs/x where programs find it; taken as a path it would be `./dbfs:/x`."""
    return Path(re.sub("^dbfs:/*", "/dbfs/", folder)).expanduser()


def mounted_store(path: Path) -> Path | None:
    """/dbfs or /Volumes where `path` lies there."""
    top = Path(*path.parts[:2])
    return top if str(top) in MOUNTS else None


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
