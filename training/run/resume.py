"""Restores what transformers and DeepSpeed forget at a resume, also on another number of ranks."""

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
from training.launch.supervisor import die_with_parent
from training.storage import checkpoint

logger = logging.getLogger(__name__)


class RestoreOnResume(TrainerCallback):
    """Restores what transformers forgets at a resume: the loss since the last line of the log, a due held-out loss, the
    epoch, a rate that was changed by `--force`.

    Args:
        trainer: the CompletionTrainer.
        saved: the checkpoint that the run goes on from, as it was written.
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
        trainer._initial_global_step = 0  # the mean loss is that of all steps, not of those since this start
        trainer.seconds_before = progress["seconds"]
        if not same_ranks and trainer.is_deepspeed_enabled:
            own_steps(trainer.model_wrapped.optimizer.optimizer)
        take_rates(trainer.lr_scheduler, args.learning_rate, args.weight_decay)
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir) / RESHARDED, ignore_errors=True)
        measured = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        due = state.global_step % args.eval_steps == 0 or state.global_step % args.save_steps == 0
        if due and state.global_step not in measured:
            loss = trainer.evaluate()["eval_loss"]
            manifest = checkpoint.read_manifest(self.saved)
            ours = self.saved.parent.resolve() == Path(args.output_dir).resolve()
            if state.is_world_process_zero and ours and manifest is not None:
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
        """Tells the sampler its epoch, or several ranks would be dealt the first epoch's rows again.

        They have it in a wrapper of accelerate's; a resume within an epoch puts a second one around that; and the
        Trainer looks into one alone.
        """
        sampler: Any = train_dataloader.batch_sampler
        sampler = getattr(sampler, "batch_sampler", sampler)
        sampler.set_epoch(state.global_step * args.gradient_accumulation_steps // len(sampler))


# A checkpoint cut for another number of ranks, below the output folder, for the start only.
RESHARDED = f"{SCRATCH}resharded"


def reshard(folder: Path, output: Path) -> Path:
    """A DeepSpeed checkpoint cut anew, as a folder that any number of ranks can start from; `folder` stays as it is.

    By DeepSpeed's own universal checkpoints (deepspeed.checkpoint.ds_to_universal). Raises OptionsError where that
    fails, or has no room: it takes 12 bytes a parameter, as long as the start lasts.
    """
    target = output / RESHARDED
    shutil.rmtree(target, ignore_errors=True)
    [shards] = folder.glob("global_step*")
    optimizer = sum(file.stat().st_size for file in shards.glob("*optim_states.pt"))
    free = free_bytes(output)
    if free is not None and free < 2 * optimizer:  # and as much again for DeepSpeed's own intermediate files
        raise OptionsError(
            f"--resume on another number of devices needs {2 * optimizer / 2**30:.1f} GiB in {output} for a while, "
            f"and {free / 2**30:.1f} are free. Make room, or use as many devices as before"
        )
    target.mkdir()
    for name in ("trainer_state.json", "scheduler.pt", checkpoint.PROGRESS_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    logger.info("%s is cut anew for another number of devices", folder)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(shards),
               "--output_folder", str(target / f"{shards.name}_universal"), "--num_extract_workers", "1",
               "--num_merge_workers", "1"]  # fmt: skip
    # Not as a rank of this run: it would look for its peers.
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=die_with_parent
    )
    if result.returncode:
        shutil.rmtree(target, ignore_errors=True)
        why = (result.stderr.strip() or "no message").splitlines()[-1]
        raise OptionsError(
            f"--resume on another number of devices: DeepSpeed cannot convert {folder} ({why}). Use as many as before"
        )
    return target


def own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives every group of parameters its own count of steps, after a start from what `reshard` has made.

    DeepSpeed 0.19.8 hands one tensor to all of them (load_hp_checkpoint_state_from_checkpoint_dir_stage3), and each
    counts it up: with two groups Adam would correct its bias for twice the steps, and take larger ones than it should.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def take_rates(scheduler: LambdaLR, lr: float, weight_decay: float) -> None:
    """Gives an optimizer the rate and the decay that were asked for, in place of those that its checkpoint holds.

    Without `--force` they are the same. But DeepSpeed's universal load gives the first group's settings to all; the
    Trainer's second group, of biases and norms, has no decay.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [lr for _ in groups]
    for group, factor, decay in zip(groups, scheduler.lr_lambdas, (weight_decay, 0.0), strict=False):
        group["initial_lr"] = lr
        group["lr"] = lr * factor(scheduler.last_epoch)
        group["weight_decay"] = decay
    scheduler._last_lr = [group["lr"] for group in groups]
