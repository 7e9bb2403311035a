"""Converts a DeepSpeed checkpoint for another number of ranks. As a command it is the process that converts."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.utils.serialization import config

from training.errors import OptionsError
from training.files import SCRATCH, free_bytes
from training.launch.supervisor import kill_on_parent_death
from training.machine.cores import usable_cores
from training.machine.local import free_host_gib
from training.storage import checkpoint

logger = logging.getLogger(__name__)

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
    workers = conversion_workers(optimizer)
    logger.info("converting %s for another number of devices, %s processes", folder, workers)
    converted = target / f"{shards.name}_universal"
    command = [sys.executable, "-m", "training.run.reshard", str(shards), str(converted), str(workers)]
    # With these variables the conversion would wait for the other ranks.
    rank_variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in rank_variables}
    result = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        preexec_fn=kill_on_parent_death,
    )  # fmt: skip
    if result.returncode:
        shutil.rmtree(target, ignore_errors=True)
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise OptionsError(
            f"--resume on another number of devices: DeepSpeed cannot convert {folder} ({reason}). Use as many as before"
        )
    return target


def conversion_workers(optimizer_bytes: int) -> int:
    """Processes that convert at once: one a core, as far as host memory allows.

    A process holds one parameter's float32 numbers twice. No parameter of a large model is more than an eighth of it, so
    that is 1/12 of the optimizer's 12 bytes a parameter.
    """
    cores = usable_cores() if sys.platform == "linux" else 1
    return max(1, min(cores, int(free_host_gib() * 2**30 // (optimizer_bytes / 12))))


def convert(shards: Path, target: Path, workers: int) -> None:
    """Runs DeepSpeed's conversion in this process and `workers` more.

    DeepSpeed 0.19.8 loads whole shards into memory, and copies the first one into optimizer_state.pt, which every rank
    then loads whole. Here shards are mapped, so that a process reads what it converts, and that file has only what the
    ranks use (stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3).
    """
    from deepspeed.checkpoint import ds_to_universal

    config.load.mmap = True
    multiprocessing.set_start_method("fork")
    os.register_at_fork(after_in_child=kill_on_parent_death)  # a killed conversion leaves no workers behind
    save = ds_to_universal._save_checkpoint

    def save_without_shards(file: str, content: Any) -> None:
        if Path(file).name == "optimizer_state.pt":
            content = {name: value for name, value in content.items() if name != "fp32_flat_groups"}
            if optimizer := content.get("optimizer_state_dict"):
                state = {0: {"step": optimizer["state"][0].get("step")}}
                content["optimizer_state_dict"] = optimizer | {"state": state}
        save(file, content)

    ds_to_universal._save_checkpoint = save_without_shards
    words: list[Path | str | int] = ["--input_folder", shards, "--output_folder", target]
    words += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    # Stage 2 does not write DeepSpeed's description of its checkpoint, which is empty without tensor parallelism.
    sys.argv[1:] = [*map(str, words), "--inject_missing_state"]
    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
