"""Restores the state that transformers and DeepSpeed lose at a resume, also on another number of ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.errors import OptionsError
from training.files import SCRATCH, free_bytes
from training.launch.supervisor import kill_on_parent_death
from training.storage import checkpoint

logger = logging.getLogger(__name__)


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
            separate_step_counts(trainer.model_wrapped.optimizer.optimizer)
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


# Folder for a checkpoint converted to another number of ranks; it exists only during the start.
RESHARDED = f"{SCRATCH}resharded"


def reshard(folder: Path, output: Path) -> Path:
    """Converts a DeepSpeed checkpoint for any number of ranks and returns the new folder; `folder` is not changed.

    Uses DeepSpeed's universal checkpoints (deepspeed.checkpoint.ds_to_universal). The new folder takes 12 bytes a
    parameter until the run has started. Raises OptionsError if the conversion fails or the disk is too full.
    """
    target = output / RESHARDED
    shutil.rmtree(target, ignore_errors=True)
    [shards] = folder.glob("global_step*")
    optimizer = sum(file.stat().st_size for file in shards.glob("*optim_states.pt"))
    free = free_bytes(output)
    if free is not None and free < 2 * optimizer:  # twice, for DeepSpeed's intermediate files
        raise OptionsError(
            f"--resume on another number of devices needs {2 * optimizer / 2**30:.1f} GiB in {output} during the "
            f"start, and {free / 2**30:.1f} GiB are free. Make room, or use as many devices as before"
        )
    target.mkdir()
    for name in ("trainer_state.json", "scheduler.pt", checkpoint.PROGRESS_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    logger.info("converting %s for another number of devices", folder)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(shards),
               "--output_folder", str(target / f"{shards.name}_universal"), "--num_extract_workers", "1",
               "--num_merge_workers", "1"]  # fmt: skip
    # With these variables the conversion would wait for the other ranks.
    rank_variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in rank_variables}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=kill_on_parent_death
    )
    if result.returncode:
        shutil.rmtree(target, ignore_errors=True)
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise OptionsError(
            f"--resume on another number of devices: DeepSpeed cannot convert {folder} ({reason}). Use as many as before"
        )
    return target


def separate_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter group its own step count after a start from a converted checkpoint (`reshard`).

    DeepSpeed 0.19.8 shares one tensor among all groups (load_hp_checkpoint_state_from_checkpoint_dir_stage3), and each
    group increments it. Adam would then correct its bias for too many steps, and its steps would be too large.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


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
