"""Predicts the time of a step in seconds and of a run in hours.

A GPU's rate is a fitted share of the peak in its data sheet; a CPU's is a fitted share of its measured rate. The parts
of a step are added up; any overlap on GPUs is included in the fitted share."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from training.machine.catalogue import LINKS, Machine, find_family
from training.machine.flops import layer_tokens, matmul_flops_per_second, training_flops

if TYPE_CHECKING:
    from training.options.settings import Settings
    from training.plan.epoch import Load
    from training.plan.model_shape import ModelShape

# Parameters per second that DeepSpeed's CPU Adam updates when the optimizer is offloaded, transfers included. One value
# for all hosts, fitted to the published runs. DeepSpeed's ZeRO-Offload tutorial has 3.1 s per step for 3e9 parameters
# (bind_cores_to_rank), which is 0.97e9.
OFFLOADED_ADAM = 1.2e9

# Accuracy: the published GPU runs and the demo measured on a CPU are within this factor of the prediction.
GPU_RANGE, CPU_RANGE = 1.5, 2.0


def step_seconds(
    model: ModelShape, machine: Machine, settings: Settings, load: Load, response_share: float
) -> dict[str, float]:
    """Seconds of one optimizer step by part: compute, gathering, optimizer.

    Gathering: in every micro-step ZeRO-3 gathers the 16-bit weights for the forward and for the backward pass, and
    reduces gradients of the same size: 3 x 2 bytes x parameters x (ranks - 1) / ranks per device (Rajbhandari et al.
    2020, section 7). Without ZeRO-3 only gradients are reduced, once per step: 2 x that size.
    """
    size, ranks, accumulation = settings.number_bytes, settings.ranks, settings.accumulation
    tokens = load.slowest_tokens
    labels = tokens * (response_share if settings.packed else 1.0)
    flops = training_flops(
        model.layer_parameters,
        model.vocabulary * model.width,
        model.width,
        model.layers,
        layer_tokens(tokens, labels, model.layers) if model.kind == "gptj" else tokens,
        labels,
        load.slowest_scores,
        passes=4 if settings.checkpointing is True else 3,
    )
    moved = 2 * size * model.parameters * (ranks - 1) / ranks
    if settings.zero.stage == 3:
        budget = settings.max_tokens
        parts = math.ceil(tokens / budget) if isinstance(budget, int) else 1
        moved *= 1.5 * accumulation * parts
    return {
        "compute": accumulation * flops / (machine.flops * find_family(machine.family).share_of_peak),
        "gathering": moved / LINKS[machine.link],
        "optimizer": model.parameters / OFFLOADED_ADAM if settings.zero.offload_optimizer else 0.0,
    }


def run_hours(
    model: ModelShape, settings: Settings, load: Load, seconds: dict[str, float], steps: int
) -> float:
    """Hours of a run: its steps, and the held-out loss before the first step and every `eval_steps`.

    Held-out rows need only the forward pass: a third of a step's compute (a quarter with checkpointing) and one of its
    three weight transfers.
    """
    options = settings.options
    forward = seconds["compute"] / (4 if settings.checkpointing is True else 3)
    batches = math.ceil(load.held_out / (settings.ranks * options.per_device_eval_batch_size))
    evaluation = forward * load.held_out / settings.global_batch
    evaluation += batches * seconds["gathering"] / settings.accumulation / 3
    evaluations = steps / options.eval_steps + 1
    return (steps * sum(seconds.values()) + evaluations * evaluation) / 3600


def cpu_rate(width: int, ranks: int) -> float:
    """Measured FLOP/s of float32 matrix products of the model's width, for each of the ranks that share this CPU.

    Takes well under a second. Above a width of 1024 the rate no longer rises. bfloat16 is not measured, because a small
    model's step does not get faster with it. Imports torch.
    """
    import torch

    rate = matmul_flops_per_second(torch.device("cpu"), torch.float32, width=min(width, 1024))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return rate * min(1.0, cores / (ranks * torch.get_num_threads()))
