"""Restores the state that transformers and DeepSpeed lose at a resume, also on another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.run.reshard import RESHARDED
from training.storage import checkpoint


class RestoreOnResume(TrainerCallback):
    """Restores the state that transformers loses at a resume: the loss since the last log line, a held-out loss that is
    due, the epoch, a learning rate changed by `--force`.

    Args:
        trainer: the CompletionTrainer.
        saved: the checkpoint as it was written, before any conversion.
    """

    def __init__(self, trainer: Any, saved: Path) -> None:
        self.trainer = trainer
        self.saved = saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        progress = json.loads((self.saved / checkpoint.PROGRESS_FILE).read_text())
        sums = progress["loss_sums"]
        mean = sum(sums) / len(sums)
        same_ranks = len(sums) == args.world_size
        trainer._tr_loss.fill_(sums[args.process_index] if same_ranks else mean)
        trainer._globalstep_last_logged = progress["logged_step"]
        trainer._total_loss_scalar = progress["loss_total"]
        trainer._initial_global_step = 0  # so that the mean loss covers all steps
        trainer.seconds_before = progress["seconds"]
        if not same_ranks and trainer.is_deepspeed_enabled:
            own_step_counts(trainer.model_wrapped.optimizer.optimizer)
        apply_rates(trainer.lr_scheduler, args.learning_rate, args.weight_decay)
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir) / RESHARDED, ignore_errors=True)
        measured = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        due = state.global_step % args.eval_steps == 0 or state.global_step % args.save_steps == 0
        if due and state.global_step not in measured:
            loss = trainer.evaluate()["eval_loss"]
            manifest = checkpoint.read_manifest(self.saved)
            in_own_folder = self.saved.parent.resolve() == Path(args.output_dir).resolve()
            if state.is_world_process_zero and in_own_folder and manifest is not None:
                checkpoint.write_manifest(self.saved, loss, manifest["model"], manifest["files"])

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: DataLoader,
        **kwargs: Any,
    ) -> None:
        """Sets the sampler's epoch. Without it several ranks would get the first epoch's rows again.

        accelerate wraps the sampler, a resume within an epoch wraps it a second time, and the Trainer looks into one
        wrapper only.
        """
        sampler: Any = train_dataloader.batch_sampler
        sampler = getattr(sampler, "batch_sampler", sampler)
        sampler.set_epoch(state.global_step * args.gradient_accumulation_steps // len(sampler))


def own_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter its own step count after a start from a converted checkpoint (`reshard`).

    DeepSpeed 0.19.8 shares one tensor among all groups (load_hp_checkpoint_state_from_checkpoint_dir_stage3), and each
    group increments it. Adam would then correct its bias for too many steps, and its steps would be too large. It also
    leaves the tensor on the CPU, which a fused Adam on a GPU refuses. Device and dtype follow the rule of torch's
    Optimizer.load_state_dict (_process_value_according_to_param_policy).
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            place = {"device": parameter.device, "dtype": torch.float32} if on_device else {}
            state["step"] = state["step"].to(**place, copy=True)


def apply_rates(scheduler: LambdaLR, lr: float, weight_decay: float) -> None:
    """Sets the optimizer's learning rate and weight decay to the options, in place of the checkpoint's values.

    The values differ after `--force`. DeepSpeed's universal load also gives all groups the first one's settings, but
    the Trainer's second group (biases and norms) has no decay.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [lr for _ in groups]
    for group, factor, decay in zip(groups, scheduler.lr_lambdas, (weight_decay, 0.0), strict=False):
        group["initial_lr"] = lr
        group["lr"] = lr * factor(scheduler.last_epoch)
        group["weight_decay"] = decay
    scheduler._last_lr = [group["lr"] for group in groups]
