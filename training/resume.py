"""Where a run begins: at its first step, or at a checkpoint of its own that is whole; on as many ranks as there are now."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from training import checkpoint
from training.checks import TRACE, free_bytes
from training.consts import RUN_FILE
from training.options import OptionsError, TrainingOptions
from training.record import differences, read_run_record
from training.supervisor import die_with_parent

logger = logging.getLogger(__name__)

# A checkpoint cut for another number of ranks, below the output folder, for the start only.
RESHARDED = f"{TRACE}resharded"


@dataclass
class Start:
    """Where a run begins. `former` is the record of the run that it continues, `saved_ranks` how many ranks that had;
    `finished` says that nothing is left to do."""

    folder: Path | None = None
    former: dict[str, Any] | None = None
    saved_ranks: int | None = None
    finished: bool = False

    @property
    def step(self) -> int:
        return 0 if self.folder is None else checkpoint.step_of(self.folder)


def find_start(output: Path, options: TrainingOptions, now: dict[str, Any], steps: int) -> Start:
    """The checkpoint that `--resume` means. Reads every byte of it, and changes nothing.

    Args:
        now: the record of the run to come.
        steps: how many that run will have done in the end.

    Raises OptionsError where there is none, or where the options would make another run of it.
    """
    if options.resume == "never":
        return Start()
    given = None if options.resume == "auto" else _given(options.resume, output)
    former = read_run_record(given.parent if given else output)
    if former is None:
        if given:
            raise OptionsError(
                [f"--resume {options.resume}: there is no {RUN_FILE} beside it, so it is of no run"]
            )
        if (output / RUN_FILE).exists() or checkpoint.checkpoints(output):
            raise OptionsError(
                [
                    f"--resume: {output / RUN_FILE} cannot be read, so nobody can tell which run this is, and nothing of "
                    "it shall be lost. Name a new --local-output-dir"
                ]
            )
        return Start()
    finished = former["status"] == "finished" and given is None
    if not given and not finished and not _has_complete(output):
        _newest_whole(output)
        if "begun_from" not in former:
            logger.info("%s has no checkpoint yet: the run begins anew", output)
            return Start()
        given = Path(former["begun_from"])
        if faults := checkpoint.faults_of(given):
            raise OptionsError(
                [
                    f"--resume: the run in {output} was begun from {given}, and has no checkpoint of its own yet; of that "
                    f"one {faults[0]}. Restore it, or name a new --local-output-dir"
                ]
            )
    different = differences(former, now)
    if different and not options.force:
        raise OptionsError(
            [
                "--resume would not give the run that was begun:\n    "
                + "\n    ".join(different)
                + "\n    Type the former options, or another --local-output-dir; --force continues all the same"
            ]
        )
    for difference in different:
        logger.warning("continued by --force, though %s", difference)
    if finished and former["steps"] == steps and former["options"].get("final_model") == options.final_model:
        return Start(former=former, finished=True)
    folder = given or _newest_whole(output)
    if folder is None:
        raise OptionsError(
            [
                f"--resume: {output} holds a finished model of {former['steps']} steps, and no checkpoint to go on from. "
                "Name a new --local-output-dir"
            ]
        )
    _check_fit(folder, options, steps)
    progress = json.loads((folder / checkpoint.PROGRESS_FILE).read_text())
    return Start(folder, former, len(progress["loss_sums"]))


def _given(resume: str, output: Path) -> Path:
    """The checkpoint that --resume names, whole and with none after it that the run would run into."""
    given, output = Path(resume).expanduser().resolve(), output.resolve()
    faults = ["it is no checkpoint"]
    if given in checkpoint.checkpoints(given.parent):
        faults = checkpoint.faults_of(given)
    if faults:
        raise OptionsError(
            [f"--resume {resume}: {faults[0]}. Type --resume auto for the newest that is whole"]
        )
    others = [each for each in checkpoint.checkpoints(output) if each != given]
    there = read_run_record(output)
    begun = there is not None and there.get("begun_from") == str(given) and not _has_complete(output)
    if given.parent != output and (others or there) and not begun:
        raise OptionsError(
            [
                f"--resume {resume}: {output} holds a run of its own. Type --resume auto to go on with that, "
                "or name a new --local-output-dir"
            ]
        )
    # A torn one is in nobody's way: it is written anew.
    written = [each for each in others if (each / checkpoint.MANIFEST_FILE).exists()]
    newer = [each.name for each in written if checkpoint.step_of(each) > checkpoint.step_of(given)]
    if newer:
        raise OptionsError(
            [
                f"--resume {resume}: {output} has newer checkpoints ({', '.join(newer)}), which the run would run into. "
                "Name a new --local-output-dir, or remove them"
            ]
        )
    return given


def _has_complete(output: Path) -> bool:
    return any(map(checkpoint.read_manifest, checkpoint.checkpoints(output)))


def _newest_whole(output: Path) -> Path | None:
    """The newest checkpoint whose every byte is right; those passed over are named in the log.

    Raises OptionsError where there are complete ones, and all of them have been damaged since.
    """
    damaged = []
    for folder in reversed(checkpoint.checkpoints(output)):
        faults = checkpoint.faults_of(folder)
        if not faults:
            return folder
        if (folder / checkpoint.MANIFEST_FILE).is_file():
            if checkpoint.read_manifest(folder) is None:
                faults = [f"{checkpoint.MANIFEST_FILE} has changed since it was written"]
            damaged.append(f"{folder.name}: {faults[0]}")
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        logger.warning("%s is passed over: %s%s", folder, faults[0], more)
    if damaged:
        raise OptionsError(
            [
                f"--resume: no checkpoint in {output} is whole ({'; '.join(damaged)}). "
                "Restore the file, or name a new --local-output-dir to begin anew"
            ]
        )
    return None


def _check_fit(folder: Path, options: TrainingOptions, steps: int) -> None:
    """Raises OptionsError if a run with these options cannot go on, or end, at this checkpoint."""
    step, manifest = checkpoint.step_of(folder), checkpoint.read_manifest(folder)
    assert manifest is not None
    measured = manifest["eval_loss"] is not None
    sharded = any(folder.glob("global_step*"))
    if sharded != bool(options.deepspeed_json):
        written, missing = ("with", "Add") if sharded else ("without", "Leave out")
        raise OptionsError(
            [
                f"--resume: {folder} was written {written} DeepSpeed. {missing} --deepspeed, and start it as before"
            ]
        )
    if step > steps or (step == steps and not measured):
        raise OptionsError(
            [
                f"--resume: {folder} is at step {step}, and the run would end at {steps}. "
                f"Raise --epochs or --max-steps to end at {step if measured else step + 1} or later"
            ]
        )


def remove_newer(output: Path, step: int) -> None:
    """Removes what a run that goes on from `step` will write again: torn checkpoints, and those passed over."""
    for folder in checkpoint.checkpoints(output):
        if checkpoint.step_of(folder) > step:
            checkpoint.remove(folder)


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
            [
                f"--resume on another number of devices needs {2 * optimizer / 2**30:.1f} GiB in {output} for a while, "
                f"and {free / 2**30:.1f} are free. Make room, or use as many devices as before"
            ]
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
            [
                f"--resume on another number of devices: DeepSpeed cannot convert {folder} ({why}). Use as many as before"
            ]
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
