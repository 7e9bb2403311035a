"""What can end a run early: SIGTERM or Ctrl-C, a lost rank, too little memory. Imports no torch at its top."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.errors import Interrupted


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
            "--gradient-checkpointing on. If it is on, type half the --per-device-train-batch-size with twice the "
            "--gradient-accumulation-steps or, if rows are packed, --max-tokens-per-device 2048. "
            "--resume auto continues from the last checkpoint"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return (
            "ran out of host memory. Start fewer ranks, use a machine with more memory, or a config without an "
            "offloaded optimizer. --resume auto continues from the last checkpoint"
        )
    return None
