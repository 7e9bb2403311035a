"""How long a step and an epoch take. Seconds and hours; GPUs by constants fitted to published runs, CPUs measured.

Nothing overlaps in this account: what overlaps on GPUs is in the fitted share of their peak."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.machine.catalogue import FAMILIES, LINKS, Machine
from training.machine.flops import layer_tokens, training_flops
from training.plan.memory import layer_bytes

if TYPE_CHECKING:
    from training.options.settings import Settings
    from training.plan.epoch import Load
    from training.plan.model_shape import ModelShape

# Parameters a second that a host updates with DeepSpeed's CPU Adam when the optimizer is offloaded, transfers
# included; for all hosts the same, and set with the published runs, too. DeepSpeed's ZeRO-Offload tutorial has 3.1 s a
# step for 3e9 parameters (bind_cores_to_rank), which is 0.97e9.
OFFLOADED_ADAM = 1.2e9

# The prediction's own accuracy: the published runs, and the measured ones on a CPU, lie within this factor.
GPU_RANGE, CPU_RANGE = 1.5, 1.3


def step_seconds(
    model: ModelShape,
    machine: Machine,
    settings: Settings,
    load: Load,
    response_share: float,
    rates: CpuRates | None = None,
) -> dict[str, float]:
    """Seconds of one optimizer step by part: compute, gathering, optimizer. With `rates`, of CPU ranks.

    Gathering: every micro-step ZeRO-3 gathers the 16-bit weights for the forward and for the backward, and
    reduces gradients of the same size: 3 x 2 bytes x parameters x (ranks - 1) / ranks through each device
    (Rajbhandari et al. 2020, section 7). Without it, only gradients are reduced, once a step: 2 x that size.
    """
    size, ranks, accumulation = settings.number_bytes, settings.ranks, settings.accumulation
    labels = load.slowest_tokens * (response_share if settings.packed else 1.0)
    tokens = load.slowest_tokens
    if model.kind == "gptj" and settings.packed:
        tokens = layer_tokens(tokens, labels, model.layers)
    flops = training_flops(
        model.layer_parameters,
        model.vocabulary * model.width,
        model.width,
        model.layers,
        tokens,
        labels,
        load.slowest_scores,
        passes=4 if settings.checkpointing is True else 3,
    )
    if rates is not None:
        return _cpu_step_seconds(model, settings, load, flops, tokens, labels, rates)
    share = size * model.parameters * (ranks - 1) / ranks
    if settings.zero.stage == 3:
        parts = (
            math.ceil(load.slowest_tokens / settings.max_tokens)
            if isinstance(settings.max_tokens, int)
            else 1
        )
        moved = 3 * share * accumulation * parts
    else:
        moved = 2 * share
    return {
        "compute": accumulation * flops / (machine.flops * FAMILIES[machine.family].share_of_peak),
        "gathering": moved / LINKS[machine.link],
        "optimizer": model.parameters / OFFLOADED_ADAM if settings.zero.offload_optimizer else 0.0,
    }


def hours_of(
    model: ModelShape, settings: Settings, load: Load, seconds: dict[str, float], steps: int
) -> float:
    """Hours of a run: its steps, and the held-out loss every `eval_steps` and before the first.

    Held-out rows go forward only: a third of a step's compute, a quarter of one with checkpointing, and one of
    its three passes of weights.
    """
    forward = seconds["compute"] / (4 if settings.checkpointing is True else 3)
    batches = math.ceil(
        settings.options.test_size / (settings.ranks * settings.options.per_device_eval_batch_size)
    )
    evaluation = forward * settings.options.test_size / settings.global_batch
    evaluation += batches * seconds["gathering"] / settings.accumulation / 3
    evaluations = steps / settings.options.eval_steps + 1
    return (steps * sum(seconds.values()) + evaluations * evaluation) / 3600


# Fitted to steps of GPT-Js of width 128 to 768 on one thread, padded and packed, float32 and bf16
# (tests/measure_cpu.py): the share of the measured rate that training's products reach; how often the tensors
# kept for backward pass through an elementwise function; seconds of a document in a layer's attention, by bytes of
# a number; bytes of a parameter's AdamW update; and seconds that ZeRO-3's hooks and gloo take for one parameter
# tensor in a step (the demo on two ranks).
CPU_SHARE = 0.93
CPU_PASSES = 6.1
CPU_DOCUMENT_SECONDS = {2: 1.0e-3, 4: 0.28e-3}
CPU_ADAM_BYTES = 19
CPU_ZERO3_SECONDS = 3.5e-3


@dataclass(frozen=True)
class CpuRates:
    """Of one CPU rank: operations/s of a matrix product of the model's width, and bytes/s of a float32 tanh."""

    matmul: float
    elementwise: float


def cpu_rates(width: int, precision: str, ranks: int = 1) -> CpuRates:
    """Measures this CPU, in under a second, and divides it among the ranks that share it. Imports torch.

    Beyond a width of 1024 the rate of a product no longer rises. Medians: the best run would leave out what other programs, and the other ranks, take.
    """
    import torch

    from training.machine.flops import matmul_flops_per_second, sigmoid_bytes_per_second

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    matmul, elementwise = zip(
        *(
            (
                matmul_flops_per_second(torch.device("cpu"), dtype, width=min(width, 1024), runs=1),
                sigmoid_bytes_per_second(),
            )
            for _ in range(9)
        ),
        strict=True,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mine = min(1.0, cores / (ranks * torch.get_num_threads()))
    return CpuRates(mine * statistics.median(matmul), mine * statistics.median(elementwise))


def _cpu_step_seconds(
    model: ModelShape,
    settings: Settings,
    load: Load,
    flops: float,
    tokens: float,
    labels: float,
    rates: CpuRates,
) -> dict[str, float]:
    """Matrix products at their measured rate, and everything else as passes of elementwise functions."""
    size = settings.weight_bytes
    touched = model.layers * layer_bytes(model, tokens, load.peak_row, size, settings.packed)
    touched += (4 if settings.packed else 12) * labels * model.vocabulary
    documents = settings.rows * model.layers * CPU_DOCUMENT_SECONDS[size] if settings.packed else 0.0
    compute = flops / rates.matmul / CPU_SHARE + CPU_PASSES * touched / rates.elementwise + documents
    zero3 = (10 * model.layers + 5) * CPU_ZERO3_SECONDS if settings.zero.stage == 3 else 0.0
    shard = model.parameters / (settings.ranks if settings.zero.stage else 1)
    return {
        "compute": settings.accumulation * compute,
        "gathering": settings.accumulation * zero3,
        "optimizer": CPU_ADAM_BYTES * shard / rates.elementwise,
    }
