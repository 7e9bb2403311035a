"""What ends a run before its time: a signal, a loss that is no number, gradients that overflow, a disk that is full.

In each case all ranks must end at the same step, and what was saved stays good.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# fp16 steps in a row that were skipped because a gradient overflowed. The loss scale of 2^16 is halved each time
# (DeepSpeed: but for the first), so it is about 1, and what overflows then is no matter of scale.
OVERFLOWS_IN_A_ROW = 16
# A scale that was small before is at its minimum earlier, and DeepSpeed raises a bare Exception with these words
# (DynamicLossScaler.update_scale).
AT_MINIMUM = "loss scale already at minimum"


class TrainingError(RuntimeError):
    """Training cannot go on. The message says at which step, why, and what to do; the last checkpoint is good.

    All ranks raise it together, and one needs to tell it; or one `alone`, which then tells it itself.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        self.alone = alone
        super().__init__(message)


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C where no step was under way that could be finished."""


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


class StepGuard(TrainerCallback):
    """At the end of each step the ranks agree whether to go on.

    One small gather a step, of two numbers a rank: asked to stop, and the micro-step with a loss that is no number.
    """

    def __init__(self, trainer: Trainer, request: StopRequest) -> None:
        self.trainer = trainer
        self.request = request
        self.bad_micro_step: torch.Tensor | None = None
        self.micro_step = 0
        self.overflows = self.overflows_in_a_row = 0
        self.stopped = False

    def see(self, loss: torch.Tensor) -> None:
        """Notes the loss of a micro-step on its device, without waiting for it."""
        place = torch.where(torch.isfinite(loss.detach()), -1, self.micro_step)
        self.bad_micro_step = (
            place
            if self.bad_micro_step is None
            else torch.where(self.bad_micro_step >= 0, self.bad_micro_step, place)
        )
        self.micro_step += 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.request.computing = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bad_micro_step is None:
            return
        mine = torch.stack([self.bad_micro_step.new_tensor(int(self.request.asked)), self.bad_micro_step])
        ranks = self.trainer.accelerator.gather(mine[None]).tolist()
        self.bad_micro_step, self.micro_step = None, 0
        bad = [(rank, micro_step) for rank, (_, micro_step) in enumerate(ranks) if micro_step >= 0]
        if bad:
            raise TrainingError(self.trainer.describe_bad_loss(*bad[0]))
        self._count_overflow(state)
        if control.should_save:
            control.should_evaluate = True  # so that the best checkpoint can be told
        if any(asked for asked, _ in ranks):
            self.stopped = True
            control.should_training_stop = control.should_save = True
            # What the signal leaves is little time. A held-out loss that was due is measured when the run goes on.
            control.should_evaluate = state.global_step >= state.max_steps

    def _count_overflow(self, state: TrainerState) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.overflows_in_a_row = 0
            return
        self.overflows += 1
        self.overflows_in_a_row += 1
        if self.overflows_in_a_row >= OVERFLOWS_IN_A_ROW:
            raise self.overflowed(state.global_step)

    def overflowed(self, step: int) -> TrainingError:
        return TrainingError(
            f"step {step}: the gradients have overflowed fp16 in {self.overflows_in_a_row} steps in a row, so nothing "
            "is learned. Lower --lr, or train in bf16 on a GPU that has it "
            "(--deepspeed config/ds_z3_bf16_offload_config.json)"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.request.computing = False
