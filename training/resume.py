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

from training import checkpoint
from training.consts import RUN_FILE
from training.options import OptionsError, TrainingOptions
from training.record import differences, read_run_record

logger = logging.getLogger(__name__)

RESHARDED = (
    ".resharded"  # a checkpoint cut for another number of ranks, below the output folder, for the start only
)


@dataclass
class Start:
    """Where a run begins. `former` is the record of the run that it continues, `saved_ranks` how many ranks that had."""

    folder: Path | None = None
    former: dict[str, Any] | None = None
    saved_ranks: int | None = None

    @property
    def step(self) -> int:
        return 0 if self.folder is None else checkpoint.step_of(self.folder)


def find_start(output: Path, options: TrainingOptions, now: dict[str, Any]) -> Start:
    """The checkpoint that `--resume` means; `now` is the record of the run to come. Reads every byte of it.

    Raises OptionsError where there is none, or where the options would make another run of it.
    """
    if options.resume == "never":
        return Start()
    given = None if options.resume == "auto" else Path(options.resume).expanduser().resolve()
    former = read_run_record(given.parent if given else output)
    if former is None:
        if given:
            raise OptionsError(
                [f"--resume {options.resume}: there is no {RUN_FILE} beside it, so it is of no run"]
            )
        return Start()
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
    folder = _checked(given, output) if given else checkpoint.newest_complete(output)
    if folder is None:
        logger.info("%s has no checkpoint that is whole: the run begins anew", output)
        return Start(former=former)
    progress = json.loads((folder / checkpoint.PROGRESS_FILE).read_text())
    return Start(folder, former, len(progress["loss_sums"]))


def _checked(given: Path, output: Path) -> Path:
    faults = checkpoint.faults_of(given)
    if faults:
        raise OptionsError(
            [f"--resume {given}: {faults[0]}. Type --resume auto for the newest that is whole"]
        )
    newer = [
        each.name
        for each in checkpoint.checkpoints(output)
        if checkpoint.step_of(each) > checkpoint.step_of(given)
    ]
    if newer and given.parent == output.resolve():
        raise OptionsError(
            [
                f"--resume {given}: {output} has newer checkpoints ({', '.join(newer)}), which the run would run into. "
                "Name a new --local-output-dir, or remove them"
            ]
        )
    return given


def reshard(folder: Path, output: Path) -> Path:
    """A DeepSpeed checkpoint cut anew, as a folder that any number of ranks can start from; `folder` stays as it is.

    By DeepSpeed's own universal checkpoints (deepspeed.checkpoint.ds_to_universal). Raises OptionsError where that
    fails, or has no room: it takes 12 bytes a parameter, as long as the start lasts.
    """
    target = output / RESHARDED
    shutil.rmtree(target, ignore_errors=True)
    [shards] = folder.glob("global_step*")
    optimizer = sum(file.stat().st_size for file in shards.glob("*optim_states.pt"))
    free = shutil.disk_usage(output).free
    if free < 2 * optimizer:  # and as much again for DeepSpeed's own intermediate files
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
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(target, ignore_errors=True)
        why = (result.stderr.strip() or "no message").splitlines()[-1]
        raise OptionsError(
            [
                f"--resume on another number of devices: DeepSpeed cannot convert {folder} ({why}). Use as many as before"
            ]
        )
    return target
