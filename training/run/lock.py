"""One writer per folder, by a lock that the system takes back from a dead process."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from training.errors import FolderBusyError
from training.files import WRITER_FILES, WRITER_INFO, WRITER_LOCK

logger = logging.getLogger(__name__)

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
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            info = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            with contextlib.suppress(OSError):  # it only tells others who we are
                (folder / WRITER_INFO).write_text(json.dumps(info))
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
