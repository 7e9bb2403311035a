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
from types import FrameType
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

# Errors of a full or broken disk, which are no bugs of this code.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Seconds for the launcher to end the other ranks after one refused the run. Spark needs about 6.
REFUSAL_GRACE = 12
PEER_GRACE = 3  # seconds for the launcher, which polls every second, to see which rank ended first


class StopRequest:
    """Records SIGTERM or Ctrl-C. During training the current step is completed; otherwise Interrupted is raised."""

    def __init__(self) -> None:
        self.received = False
        self.computing = False

    def listen(self) -> None:
        """Installs the handler of both signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        if first and not self.computing:
            raise Interrupted


@contextmanager
def default_sigterm() -> Iterator[None]:
    """SIGTERM ends this process at once, as no Python handler runs while libraries wait in C++ for the other ranks.

    There is nothing to save yet. Without it, a rank would hang if rank 0 refused the run.
    """
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


# --- kinds of error ------------------------------------------------------------------------------------


def lost_peer(error: Exception) -> bool:
    """Whether gloo or NCCL reports that another rank ended or did not answer in time."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    # gloo reports the last one for a wait that starts or is polled after another wait has timed out.
    signs = (
        "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting",
        "caused pair closure",
    )  # fmt: skip
    found = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return found and torch.distributed.is_initialized()


def timed_out(error: Exception) -> bool:
    """Whether the error of a lost peer is a timeout."""
    return any(sign in str(error) for sign in ("imed out", "timeout", "Timeout"))


def out_of_memory(error: Exception) -> str | None:
    """The message if the error means that GPU or host memory ran out; None for any other error."""
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in text:
        return (
            f"ran out of GPU memory ({text.splitlines()[0].split('. GPU')[0]}). Type "
            "--gradient-checkpointing on. If it is on, type --max-tokens-per-device 2048, or half the "
            "--per-device-train-batch-size with twice the --gradient-accumulation-steps. "
            "--resume auto continues from the last checkpoint"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return (
            "ran out of host memory. Start fewer ranks, use a machine with more memory, or a config without an "
            "offloaded optimizer. --resume auto continues from the last checkpoint"
        )
    return None


# --- how the process ends ----------------------------------------------------------------------------


@contextmanager
def exit_with_message(output: str | None, rank_timeout: int) -> Iterator[None]:
    """Turns each error that ends the run into a message and an exit code (launch/exits.py).

    Args:
        output: the run's --local-output-dir, as it was typed.
        rank_timeout: seconds that a rank waits for the others.
    """
    try:
        yield
    except PublishError as error:
        _end(f"Cannot publish:\n{error}", 1)
    except (OptionsError, DataError, ModelError, FolderBusyError) as error:
        # Usually every rank finds the same problems: rank 0 reports them, and the launcher ends the waiting others. If
        # the problems are on one node only, its ranks outlive the wait and report them.
        if not ranks.is_main_process():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(REFUSED))
            time.sleep(REFUSAL_GRACE)
        _end(f"Cannot train:\n{error}", REFUSED)
    except TrainingError as error:
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
    finally:
        ranks.end_process_group()


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
    _print(
        f"Rank {ranks.rank()} {waited} another rank. Look for its last message; a rank that hangs prints none"
    )
    time.sleep(PEER_GRACE)
    os._exit(LOST_PEER)


def _end(message: str, code: int) -> NoReturn:
    if message:
        _print(message)
    sys.exit(code)


def _print(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)
