"""Run by test_trainer.py on two ranks: loads a model under ZeRO-3 and prints the memory it took, in GiB.

torchrun --nproc_per_node 2 -m tests.run.zero3_loading FOLDER
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import deepspeed
import torch

from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.model.loading import load_model
from training.model.tokenizer import load_tokenizer
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.ranks import world_size
from training.run.operators import compile_operators
from training.run.prepare import training_arguments

CONFIG = Path(__file__).parents[2] / "config" / "ds_z3_bf16_config.json"


def own_memory() -> float:
    """Anonymous resident memory of this process in GiB, without pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20


def main(folder: str) -> None:
    compile_operators({})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    arguments = training_arguments(
        resolve(TrainingOptions(deepspeed=str(CONFIG), local_output_dir=folder), world_size(), "bf16")
    )
    tokenizer = load_tokenizer(folder)
    before, peak, done = own_memory(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, tokenizer, torch.bfloat16, 42)
    done.set()
    watcher.join()
    shard = (
        sum(p.ds_tensor.numel() if hasattr(p, "ds_id") else p.numel() for p in model.parameters()) * 2 / 2**30
    )
    figures = {"shard": shard, "peak": peak - before, "after": own_memory() - before}
    # One write: unbuffered print() writes text and newline separately, and the ranks' lines would mix.
    sys.stdout.write(f"rank {arguments.process_index} {json.dumps(figures)}\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
    remove_shared_buffer()


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[-1]))
