"""Ends a run with a message and an exit code: on a signal, a lost rank, too little memory, a full disk.

It does not import torch at module level.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from training import ranks
from training.consts import RUN_FILE
from training.errors import (
    DataError,
    FolderBusyError,
    Interrupted,
    ModelError,
    OptionsError,
    PublishError,
    TrainingError,
    printable,
)
from training.files import expanded
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, LOST_PEER, REFUSED
from training.options.wording import worded
from training.run.failures import lost_peer, out_of_memory, timed_out

# Errors of a full or broken disk, which are no bugs of this code.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Seconds that the other ranks wait for rank 0 to report what all have found, and to be ended. Spark needs about 6.
RANK_0_GRACE = 12


@contextmanager
def exit_with_message(output: str | None, rank_timeout: int) -> Iterator[None]:
    """Turns each error that ends the run into a message and an exit code (launch/exits.py).

    It leaves the process group alone. NCCL's shutdown waits for the other ranks, which may wait for this one.

    Args:
        output: the run's --local-output-dir, as it was typed.
        rank_timeout: seconds that a rank waits for the others.
    """
    try:
        yield
    except PublishError as error:
        _end(f"Cannot publish:\n{error}", 1)
    except (OptionsError, DataError, ModelError, FolderBusyError) as error:
        # If the problems are on one node only, its ranks outlive the wait and report them.
        _let_rank_0_report(REFUSED)
        _end(f"Cannot train:\n{error}", REFUSED)
    except TrainingError as error:
        if not error.alone:
            _let_rank_0_report(CANNOT_CONTINUE)
        _end(f"Training ended at {error}" if error.alone or ranks.is_main_process() else "", CANNOT_CONTINUE)
    except Interrupted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher may send it again during shutdown
        started = (Path(expanded(output or "")) / RUN_FILE).exists()
        again = "with --resume auto" if started else "again"  # the command may hold --resume FOLDER
        _end(
            f"Stopped. To continue, type the same command {again}" if ranks.is_main_process() else "",
            INTERRUPTED,
        )
    except OSError as error:
        if error.errno not in FULL_OR_BROKEN:
            raise
        _end(
            f"Training ended: {error.filename2 or error.filename or output} could not be written ({error.strerror}). "
            "Make room or repair the disk, then type the same command with --resume auto",
            CANNOT_CONTINUE,
        )
    except (RuntimeError, MemoryError) as error:
        _end_of_libraries(error, rank_timeout)


def _let_rank_0_report(code: int) -> None:
    """Waits on the other ranks: all found the same, rank 0 reports it, and its end ends them."""
    if not ranks.is_main_process():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(RANK_0_GRACE)


def _end_of_libraries(error: RuntimeError | MemoryError, rank_timeout: int) -> NoReturn:
    """Ends the process for known errors of torch, gloo and NCCL; raises any other error again."""
    if message := out_of_memory(error):
        _end(f"Rank {ranks.rank()} {message}", CANNOT_CONTINUE)
    if "EADDRINUSE" in str(error):
        port = os.environ.get("MASTER_PORT")
        _end(
            f"Cannot train:\n  - port {port} (MASTER_PORT) is in use, most likely by another run. "
            "Type deepspeed --master_port 29501 ... (torchrun: --master-port)",
            REFUSED,
        )
    if not lost_peer(error):
        raise error
    waited = f"waited {rank_timeout} s (--rank-timeout) for" if timed_out(error) else "lost"
    _end(
        f"Rank {ranks.rank()} {waited} another rank. Look for its last message; a rank that hangs prints none",
        LOST_PEER,
    )


def _end(message: str, code: int) -> NoReturn:
    if message:
        print(printable(worded(message)), file=sys.stderr, flush=True)
    sys.exit(code)
