"""What ends a run before its time, in words: a signal, a lost peer, too little memory, a full disk."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training.errors import Interrupted


def lost_peer(error: Exception) -> bool:
    """Whether gloo or NCCL says that another rank went away, or did not come within its time."""
    if isinstance(error, torch.distributed.DistError):
        return True
    # gloo's last sign is of a wait that is begun, or only looked at, once another one has timed out.
    signs = (
        "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "caused pair closure",
    )  # fmt: skip
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return told and torch.distributed.is_initialized()


def timed_out(error: Exception) -> bool:
    """Whether a lost peer is one that was waited for in vain, as far as the error tells."""
    return any(sign in str(error) for sign in ("imed out", "timeout", "Timeout"))


def out_of_memory(error: Exception) -> str | None:
    """What a rank that got no more memory says, of its GPU or of the host; None for any other error."""
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


@contextmanager
def mortal() -> Iterator[None]:
    """SIGTERM ends this process at once: while the ranks meet, libraries wait in C++, where no handler of Python's is
    called, and there is nothing to save. A rank whose rank 0 was refused would else hang until it is killed."""
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


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


def leave_ranks() -> None:
    """What remains is rank 0's alone, and no model that it loads may be sharded over the others."""
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
