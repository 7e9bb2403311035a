"""Predicts the seconds of a run outside its steps and evaluations: start, loading, checkpoints, the finished folder.

Each function returns seconds by part, in the order in which they pass. Rates are bytes per second. "Measured" means in
CPU time of one thread, on the machine of docs/evidence.md. The other rates are assumptions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from training.plan.adapter import trained_parameters

if TYPE_CHECKING:
    from training.machine.catalogue import Machine
    from training.options.settings import Settings
    from training.plan.epoch import Load
    from training.plan.model_shape import ModelShape

START_SECONDS = 15.0  # launcher, supervisor, imports, test of the architecture: an assumption
NCCL_SECONDS = 10.0  # CUDA contexts and NCCL's first collective on several GPUs: an assumption
TOKENISED_ROWS = 13_000  # rows per second: measured, 50,000 rows in 3.8 s

DOWNLOAD = 0.3e9  # from the Hub: an assumption
LOADING = 0.7e9  # one process reads a file, converts it and hands out the shards: an assumption
DEVICE_TO_HOST = 3e9  # to memory that is not pinned, PCIe 4: an assumption
FINITE = 5.7e9  # torch.aminmax of bf16: measured 5.7e9 to 11e9
SAFETENSORS = 1.2e9  # writing a weight file from host memory into the page cache: measured up to 2.2e9
TORCH_SAVE = 1.1e9  # the same for a shard of the optimizer: measured 1.1e9 to 1.3e9
DISK = 2e9  # fsync: an assumption. A local NVMe drive writes 1e9 to 2e9; machines with eight GPUs have up to eight
# SHA-256: measured with the CPU's SHA instructions switched off, 0.33e9 to 0.47e9. Intel's CPUs before Ice Lake (p3dn,
# p4d) have none. With them 1.5e9 to 1.9e9 were measured.
HASH = 0.47e9
SHARD = 5e9  # default of --max-shard-size; a file is hashed by one thread
WRITER_THREADS = 4  # of a rank in model/weight_files.py; a thread writes one file
MERGING = 1e9  # weights to which the adapter's product is added, on the cores of a GPU machine: an assumption
ANSWER = 2e9  # weights, for a prompt and four answer tokens on the cores of a GPU machine: an assumption
PUBLISHING = 0.2e9  # writing to DBFS, a Volume or S3, and reading back: an assumption, the same for both


def start_seconds(model: ModelShape, machine: Machine, settings: Settings, load: Load) -> dict[str, float]:
    """Seconds before the first evaluation: start, download of the model, loading.

    Under ZeRO-3 rank 0 reads the file and hands out shards; otherwise every rank of a machine reads it for itself.
    """
    rows = load.held_out + load.steps * settings.global_batch
    several = not machine.is_cpu and settings.ranks > 1
    return {
        "start": START_SECONDS + several * NCCL_SECONDS + rows / TOKENISED_ROWS,
        "download": model.file_bytes / DOWNLOAD if model.downloaded else 0.0,
        "loading": model.file_bytes / LOADING,
    }


def checkpoint_seconds(model: ModelShape, machine: Machine, settings: Settings) -> dict[str, float]:
    """Seconds of one checkpoint by part (run/saving.py). All ranks wait until the last one has finished it.

    Each rank writes its shard of weights and optimizer, then the files are flushed and hashed by all ranks. A rank's shard
    is one file. Below stage 3 rank 0 also writes the whole model. Without ZeRO it writes all of the optimizer. A frozen
    base is not written.
    """
    trained = trained_parameters(model, settings)
    weights = settings.weight_bytes * trained
    whole = 0.0 if settings.zero.stage == 3 else weights
    states = settings.checkpoint_bytes * trained - whole
    shard = states / (settings.ranks if settings.zero.stage else 1)
    local = min(settings.ranks, machine.count) if settings.zero.stage else 1
    copying = 0.0 if machine.is_cpu else 1 / DEVICE_TO_HOST  # seconds a byte
    from_device = 0.0 if settings.zero.offload_optimizer else copying
    return {
        "checking": weights / settings.ranks / FINITE,
        "writing the model": whole * (1 / SAFETENSORS + copying),
        "writing the shards": shard * (1 / TORCH_SAVE + from_device),
        "flushing": (whole + local * shard) / DISK,
        "hashing": max(shard, whole if settings.zero.stage else min(whole, SHARD)) / HASH,
    }


def finish_seconds(model: ModelShape, settings: Settings) -> dict[str, float]:
    """Seconds after the last checkpoint: the model, its verification on rank 0's CPU, and publishing if it was requested.

    With an adapter rank 0 first loads the base again and merges the adapter into it. It alone writes the model.

    Under DeepSpeed every rank reads, casts, hashes and writes its files of the model, on several threads, and the files
    are flushed (run/final_model.py). Verification reads them for NaN, loads the model and lets it answer (run/finish.py).
    Publishing hashes the files on one thread, writes them and reads them back (storage/copy.py).
    """
    weights = settings.weight_bytes * model.parameters
    ranks = 1 if settings.lora else settings.ranks
    writers = ranks * min(WRITER_THREADS, math.ceil(weights / ranks / SHARD))
    written = 0.0
    if settings.zero.stage or settings.lora:
        written = weights * (1 / DISK + (1 / SAFETENSORS + 1 / HASH) / writers)
    merging = model.file_bytes / LOADING + weights / MERGING if settings.lora else 0.0
    loading = weights / SAFETENSORS
    published = weights * (1 / HASH + 2 / PUBLISHING) if settings.options.dbfs_output_dir else 0.0
    return {
        **({"merging": merging} if settings.lora else {}),
        "model": written,
        "verification": weights / FINITE + loading + weights / ANSWER,
        "publishing": published,
    }


def evaluations(settings: Settings, steps: int) -> int:
    """How often the held-out loss is computed: before step 1, every eval_steps, at each checkpoint, at the end."""
    options = settings.options
    assert options.save_steps is not None, "a time was turned into steps"
    both = steps // math.lcm(options.eval_steps, options.save_steps)
    within = steps // options.eval_steps + steps // options.save_steps - both
    return 1 + within + bool(steps % options.eval_steps and steps % options.save_steps)


def checkpoints(settings: Settings, steps: int) -> int:
    """How many checkpoints are written: every save_steps, and at the end."""
    assert settings.options.save_steps is not None, "a time was turned into steps"
    return math.ceil(steps / settings.options.save_steps)
