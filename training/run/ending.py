"""What ends a run before its time, in words: a signal, a lost peer, too little memory, a full disk.

Imports no torch at its top.
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
)
from training.launch.exits import ENDED, INTERRUPTED, LOST_PEER, REFUSED

# What a disk says that is no mistake of ours.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Seconds that launchers need to end the ranks of a run that another rank has refused; Spark about 6.
REFUSAL_GRACE = 12
PEER_GRACE = 3  # seconds that a launcher, which looks every second, has to see which rank ended first


class StopRequest:
    """Whether SIGTERM or Ctrl-C has asked this process to end. While steps are computed it waits for the step's end."""

    def __init__(self) -> None:
        self.asked = False
        self.computing = False

    def listen(self) -> None:
        """Takes the two signals over, for good."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first and not self.computing:
            raise Interrupted


@contextmanager
def mortal() -> Iterator[None]:
    """SIGTERM ends this process at once: while the ranks meet, libraries wait in C++, where no handler of Python's is
    called, and there is nothing to save. A rank whose rank 0 was refused would else hang until it is killed."""
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


# --- what an error means -----------------------------------------------------------------------------


def lost_peer(error: Exception) -> bool:
    """Whether gloo or NCCL says that another rank went away, or did not come within its time."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    # gloo's last sign is of a wait that is begun, or only looked at, once another one has timed out.
    signs = (
        "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "caused pair closure",
    )  # fmt: skip
    found = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return found and torch.distributed.is_initialized()


def timed_out(error: Exception) -> bool:
    """Whether a lost peer is one that was waited for in vain, as far as the error tells."""
    return any(sign in str(error) for sign in ("imed out", "timeout", "Timeout"))


def out_of_memory(error: Exception) -> str | None:
    """What a rank that got no more memory says, of its GPU or of the host; None for any other error."""
    import torch

    words = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in words:
        return (
            f"ran out of GPU memory ({words.splitlines()[0].split('. GPU')[0]}). Type --gradient-checkpointing on; if it is, "
            "--max-tokens-per-device 2048, or half the --per-device-train-batch-size with twice the "
            "--gradient-accumulation-steps; and --resume auto goes on from the last checkpoint"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in words:
        return (
            "ran out of host memory. Start fewer ranks, use a machine with more, or a config without an offloaded "
            "optimizer; --resume auto goes on from the last checkpoint"
        )
    return None


# --- how the process ends ----------------------------------------------------------------------------


@contextmanager
def in_words(output: str | None, rank_timeout: int) -> Iterator[None]:
    """Turns every end of a run in the `with` that is no success into words and an exit code (launch/exits.py).

    Args:
        output: the run's --local-output-dir, as it was typed.
        rank_timeout: seconds that a rank waits for the others.
    """
    try:
        yield
    except PublishError as error:
        _end(f"Cannot publish:\n{error}", 1)
    except (OptionsError, DataError, ModelError, FolderBusyError) as error:
        # Most problems are found by every rank. One reports them, and the launcher ends the others while they wait; what
        # is wrong on one node alone its own ranks must report.
        if not ranks.is_main_process():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(REFUSED))
            time.sleep(REFUSAL_GRACE)
        _end(f"Cannot train:\n{error}", REFUSED)
    except TrainingError as error:
        _end(f"Training ended at {error}" if error.alone or ranks.is_main_process() else "", ENDED)
    except Interrupted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher may repeat it while Python shuts down
        started = (Path(os.path.expanduser(output or "")) / RUN_FILE).exists()
        again = "with --resume auto" if started else "again"  # which may name another run's checkpoint
        _end(
            f"Stopped. To go on, type the same command {again}" if ranks.is_main_process() else "",
            INTERRUPTED,
        )
    except OSError as error:
        if error.errno not in FULL_OR_BROKEN:
            raise
        _end(
            f"Training ended: {error.filename2 or error.filename or output} could not be written ({error.strerror}). "
            "Make room, or mend the disk, and type the same command with --resume auto",
            ENDED,
        )
    except (RuntimeError, MemoryError) as error:
        _end_of_libraries(error, rank_timeout)
    finally:
        ranks.leave()


def _end_of_libraries(error: RuntimeError | MemoryError, rank_timeout: int) -> NoReturn:
    """Ends for what torch, gloo or NCCL raise; raises what none of them would."""
    if lack := out_of_memory(error):
        _end(f"Rank {ranks.rank()} {lack}", ENDED)
    if "EADDRINUSE" in str(error):
        port = os.environ.get("MASTER_PORT")
        _end(
            f"Cannot train:\n  - port {port}, by which the ranks meet, is taken, most likely by another run. "
            "Type deepspeed --master_port 29501 ... (torchrun: --master-port)",
            REFUSED,
        )
    if not lost_peer(error):
        raise error
    waited = f"waited {rank_timeout} s (--rank-timeout) for" if timed_out(error) else "lost"
    _say(f"Rank {ranks.rank()} {waited} another rank: one that ended says why, one that hangs says nothing")
    time.sleep(PEER_GRACE)
    os._exit(LOST_PEER)


def _end(words: str, code: int) -> NoReturn:
    if words:
        _say(words)
    sys.exit(code)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
