"""One writer per folder, by a file lock that the system releases when the process dies."""

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

# Errors of file systems without locks, such as NFS without its lock daemon or Lustre mounted without flock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def system_lock(file: Path, timeout: float = -1) -> AbstractContextManager[Any] | None:
    """Takes a file lock; leaving the context releases it. The system releases it when the process dies.

    Returns None if the file system has no locks. Raises filelock.Timeout if another process still holds the lock
    after `timeout` seconds; -1 waits forever.
    """
    from filelock import FileLock

    try:
        # filelock's fallback without system locks is a file that a killed process leaves behind.
        return FileLock(file, fallback_to_soft=False).acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Makes this process the only writer of `folder`, and creates it if needed. One rank of a run calls it.

    A process that dies leaves no lock behind. Raises FolderBusyError if another process is the writer.
    """
    from filelock import Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = system_lock(folder / WRITER_LOCK, timeout=0)
    except Timeout as error:
        raise FolderBusyError(_who_writes(folder)) from error
    if lock is None:
        logger.warning(
            "%s: its file system has no locks, so nothing stops a second run from writing into it. Start only one",
            folder,
        )
        yield
        return
    with lock:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            info = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            with contextlib.suppress(OSError):  # only for the message of a refused run
                (folder / WRITER_INFO).write_text(json.dumps(info))
            yield
        finally:
            # Removed while the lock is held: filelock never locks a file that was unlinked.
            for name in WRITER_FILES[::-1]:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _who_writes(folder: Path) -> str:
    try:
        info = json.loads((folder / WRITER_INFO).read_text())
        who = f"process {info['pid']} on {info['host']}, since {info['since']}"
        stop = f"stop it (kill {info['pid']} on {info['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        who, stop = "unknown process", "stop it"
    return (
        f"{folder}: another run is writing into it ({who}). "
        f"Wait until it has ended, {stop}, or name another --local-output-dir"
    )
