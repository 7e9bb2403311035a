"""Ends a run on all ranks at the same step: after a signal, a NaN loss or repeated fp16 overflows."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from training.errors import TrainingError
from training.model.verify import largest_magnitudes
from training.ranks import gather
from training.run.failures import StopRequest

# Limit of consecutive fp16 steps that are skipped for an overflow. Each halves the loss scale of 2^16 (with DeepSpeed
# not the first), so the scale is about 1 by then and cannot be the cause.
OVERFLOWS_IN_A_ROW = 16

# DeepSpeed raises a bare Exception with these words if a small scale reaches its minimum earlier
# (DynamicLossScaler.update_scale).
AT_MINIMUM = "loss scale already at minimum"


class StepGuard(TrainerCallback):
    """Lets the ranks agree at the end of each step whether to continue.

    Each step gathers three numbers a rank: whether a stop was requested, the micro-step with a NaN or infinite loss, and
    how far the save in flight is.
    """

    def __init__(self, trainer: Any, request: StopRequest) -> None:
        self.trainer = trainer
        self.request = request
        self.bad_micro_step: torch.Tensor | None = None
        self.micro_step = 0
        self.overflows = self.overflows_in_a_row = 0
        self.stopped = False

    def note_loss(self, loss: torch.Tensor) -> None:
        """Records on the device whether the loss of a micro-step is finite, without waiting for it."""
        bad = torch.where(torch.isfinite(loss.detach()), -1, self.micro_step)
        self.bad_micro_step = (
            bad
            if self.bad_micro_step is None
            else torch.where(self.bad_micro_step >= 0, self.bad_micro_step, bad)
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
        stop = self.bad_micro_step.new_full((), int(self.request.received))
        saved = self.bad_micro_step.new_full((), self.trainer.writer.status)
        report = torch.stack([stop, self.bad_micro_step, saved])
        ranks = self.trainer.accelerator.gather(report[None]).tolist()  # the one wait for the device
        self.bad_micro_step, self.micro_step = None, 0
        bad = [(rank, micro_step) for rank, (_, micro_step, _) in enumerate(ranks) if micro_step >= 0]
        if bad:
            self.trainer.finish_save()  # a checkpoint of an earlier step
            raise TrainingError(self.trainer.describe_bad_loss(*bad[0]))
        begin = time.perf_counter()
        self.trainer.check_save([saved for _, _, saved in ranks])
        self.trainer.counter.skip(time.perf_counter() - begin)
        self._count_overflow(state)
        if control.should_save:
            control.should_evaluate = True  # the best checkpoint is chosen by this loss
        if any(stop for stop, _, _ in ranks):
            self.stopped = True
            control.should_training_stop = control.should_save = True
            # Little time is left after a signal. A held-out loss that is due is measured at the resume.
            control.should_evaluate = state.global_step >= state.max_steps

    def _count_overflow(self, state: TrainerState) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.overflows_in_a_row = 0
            return
        self.overflows += 1
        self.overflows_in_a_row += 1
        if self.overflows_in_a_row >= OVERFLOWS_IN_A_ROW:
            self.trainer.finish_save()
            raise self.overflowed(state.global_step)

    def overflowed(self, step: int) -> TrainingError:
        return TrainingError(
            f"step {step}: the gradients have overflowed fp16 in {self.overflows_in_a_row} steps in a row, so nothing "
            "is learned. Lower --lr, or train in bf16 on a GPU that has it "
            "(--deepspeed config/ds_z3_bf16_config.json)"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_save()  # a signal that reaches this rank meanwhile must not end it: the others would wait
        self.request.computing = False


def describe_bad_base(model: PreTrainedModel, fp16: bool) -> str:
    """Message for a base model whose loss is NaN or infinite before any step. All ranks call it."""
    weights = {name: _own_numbers(parameter) for name, parameter in model.named_parameters()}
    largest = zip(weights, largest_magnitudes(weights.values()), strict=True)
    here = [name for name, magnitude in largest if not math.isfinite(magnitude)]
    names = sorted({name for of_rank in gather(here) for name in of_rank})
    message = f"step 0: the held-out loss of the base model {model.name_or_path} is NaN or infinite before any training. "
    if names:
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        return message + (
            f"Its weights hold NaN or infinite numbers in {names[0]}{more}. Download it again, or name another base model"
        )
    advice = "Train in bf16, because fp16 overflows in many models. " if fp16 else ""
    return message + f"Its weights are finite. {advice}Look at the held-out rows, or name another base model"


def _own_numbers(parameter: Any) -> torch.Tensor:
    """The parameter, or this rank's shard of it under ZeRO-3, without the padding: that memory was never written."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    behind = parameter.ds_numel - parameter.ds_zero_partition_rank * shard.numel()
    return shard[: max(0, behind)]
