"""Predicts the seconds of a step and of an evaluation, by part.

On a GPU the host queues the kernels ahead of the device, so a step takes the longer of the two. The device's kernels and
its communication are added up: overlap is not assumed. On a CPU host and device are the same, and one fitted share of
the measured rate includes both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from training.machine.catalogue import LINKS, Machine, find_family
from training.machine.cores import usable_cores
from training.machine.flops import layer_tokens, matmul_flops_per_second, training_flops
from training.plan.adapter import NF4_BYTES, adapter_of, quantized_parameters, trained_parameters

if TYPE_CHECKING:
    from training.options.settings import Settings
    from training.plan.epoch import Load
    from training.plan.model_shape import ModelShape

# Share of a GPU family's `share_of_peak` that padded rows reach, with the eager attention of 2023: float32 scores and
# five kernels for gelu_new. Fitted to the published runs, together with OFFLOADED_ADAM.
PADDED_SHARE = 0.6

# Parameters per second that DeepSpeed's CPU Adam updates when the optimizer is offloaded, transfers included: one value
# for all hosts, fitted to the published runs. DeepSpeed's pull request 7474 has complete steps of 3.1 s for 3e9
# parameters, and of 2.4 s with bind_cores_to_rank: at least 1.0e9 and 1.3e9.
OFFLOADED_ADAM = 1.2e9

# Bytes of device memory that one update of a parameter moves: float32 gradient, norm, Adam on three states, the copy to
# 16 bit. An estimate from the operations of DeepSpeed's stage3.py. Memory moves one byte in the time of about 200 FLOPs at
# the peak (A100: 312e12 / 1.56e12; 117 to 295 for the other GPUs, NVIDIA's data sheets).
UPDATE_BYTES, FLOPS_PER_BYTE = 60, 200

# Seconds of Python and PyTorch to queue the forward and backward pass of one layer, by ZeRO stage: measured on CPU for a
# GPT-J of 28 layers of tiny width, one rank. ZeRO-3 handles each block as a whole.
HOST_LAYER = {0: 1.3e-3, 1: 2.3e-3, 2: 2.7e-3, 3: 3.9e-3}
HOST_LAYER_BY_MODULE = 9.2e-3  # ZeRO-3 that gathers each module of a block on its own
# The same for the two matrices of an adapter, forward and backward: measured like HOST_LAYER, six of them add 1.0 ms.
HOST_ADAPTER = 0.17e-3
# The same for one document of a packed row, where attention is one call for each document: a GPU without bf16.
HOST_DOCUMENT = 0.11e-3
# Launching a kernel takes longer than running it on tiny tensors, and the cores of cloud machines are slower: an
# assumption.
HOST_FACTOR = 1.3

# Accuracy: the published GPU runs and the demo measured on a CPU are within this factor of the prediction.
GPU_RANGE, CPU_RANGE = 1.5, 2.0


def step_seconds(
    model: ModelShape, machine: Machine, settings: Settings, load: Load, response_share: float
) -> dict[str, float]:
    """Seconds of one optimizer step by part: compute, gathering, optimizer, waiting for the host. Their sum is the step.

    Gathering: in every micro-step ZeRO-3 gathers the 16-bit weights for the forward and for the backward pass, and
    reduces gradients of the same size: 3 x 2 bytes x parameters x (ranks - 1) / ranks per device (Rajbhandari et al.
    2020, section 7). ZeRO-2 reduces gradients in every micro-step and gathers weights once per step, ZeRO-1 both once.
    Their gradients count twice if they are sent to all ranks. Without ZeRO they are, once per step. With an adapter only its
    gradients are reduced, and only stage 3 gathers frozen weights.
    """
    micro_steps = settings.accumulation * _parts(settings, load)
    compute = settings.accumulation * _flops(model, settings, load, response_share) / _rate(machine, settings)
    zero = settings.zero
    reduced = 2 if zero.all_reduce else 1
    trained = trained_parameters(model, settings)
    transfers = {3: micro_steps, 2: reduced * micro_steps + 1, 1: reduced + 1}.get(zero.stage, 2)
    gathering = transfers * _transfer_seconds(trained, machine, settings)
    if zero.stage == 3:
        gathering += 2 * micro_steps * _transfer_seconds(_all_parameters(model, settings), machine, settings)
    unpacking = micro_steps * _unpacking_seconds(model, machine, settings)
    host = micro_steps * host_seconds(model, machine, settings)
    return {
        "compute": compute,
        "unpacking": unpacking,
        "gathering": gathering,
        "optimizer": _optimizer_seconds(model, machine, settings),
        "waiting for the host": max(0.0, host - compute - unpacking - gathering),
    }


def _flops(model: ModelShape, settings: Settings, load: Load, response_share: float) -> float:
    """FLOPs of the slowest device in one micro-step."""
    tokens = load.slowest_tokens
    labels = tokens * (response_share if settings.packed else 1.0)
    adapter = adapter_of(model, settings)
    return training_flops(
        model.layer_parameters,
        model.vocabulary * model.width,
        model.width,
        model.layers,
        layer_tokens(tokens, labels, model.layers) if model.kind == "gptj" else tokens,
        labels,
        load.slowest_scores,
        passes=_passes(settings),
        adapters=adapter.matrices if adapter else None,
    )


def _passes(settings: Settings) -> int:
    """Cost of a micro-step's layers in forward passes."""
    return 4 if settings.checkpointing is True else 3


def _parts(settings: Settings, load: Load) -> int:
    """Parts into which a device's rows are split, because they have more than `max_tokens`."""
    budget = settings.max_tokens
    return math.ceil(load.slowest_tokens / budget) if isinstance(budget, int) else 1


def _rate(machine: Machine, settings: Settings) -> float:
    """FLOP/s that forward and backward reach on a device."""
    padded = PADDED_SHARE if not (settings.packed or machine.is_cpu) else 1.0
    return machine.flops * find_family(machine.family).share_of_peak * padded


def _all_parameters(model: ModelShape, settings: Settings) -> int:
    adapter = adapter_of(model, settings)
    return model.parameters + (adapter.parameters if adapter else 0)


def _transfer_seconds(parameters: float, machine: Machine, settings: Settings) -> float:
    """Seconds to send weights, or gradients, once between all devices."""
    return settings.number_bytes * parameters * (settings.ranks - 1) / settings.ranks / LINKS[machine.link]


def _unpacking_seconds(model: ModelShape, machine: Machine, settings: Settings) -> float:
    """Seconds to turn weights of 4 bits into 16 bits in one micro-step: in each pass forward and backward.

    Memory-bound: the kernel reads 4 bits and writes 16, and the product reads those. An assumption; 0 on a CPU.
    """
    quantized = quantized_parameters(model, settings)
    if machine.is_cpu or not quantized:
        return 0.0
    moved = quantized * (NF4_BYTES + 2 * settings.number_bytes)
    return (_passes(settings) - 1) * moved * FLOPS_PER_BYTE / machine.flops


def _optimizer_seconds(model: ModelShape, machine: Machine, settings: Settings) -> float:
    trained = trained_parameters(model, settings)
    if settings.zero.offload_optimizer:
        return trained / OFFLOADED_ADAM
    shard = trained / (settings.ranks if settings.zero.stage else 1)
    return 0.0 if machine.is_cpu else shard * UPDATE_BYTES * FLOPS_PER_BYTE / machine.flops


def host_seconds(model: ModelShape, machine: Machine, settings: Settings) -> float:
    """Seconds that the host needs to queue one micro-step on a GPU; 0 on a CPU, whose fitted share includes them."""
    if machine.is_cpu:
        return 0.0
    family, layer = find_family(machine.family), HOST_LAYER[settings.zero.stage]
    if settings.zero.stage == 3 and settings.whole_blocks is not True:
        layer = HOST_LAYER_BY_MODULE
    if settings.packed and family.precision != "bf16":
        layer += settings.rows * HOST_DOCUMENT
    adapter = adapter_of(model, settings)
    adapters = HOST_ADAPTER * len(adapter.layers) if adapter else 0.0
    return HOST_FACTOR * (layer * model.layers + adapters) * _passes(settings) / 3


def evaluation_seconds(
    model: ModelShape, machine: Machine, settings: Settings, load: Load, step: dict[str, float]
) -> float:
    """Seconds to compute the held-out loss once. `step` comes from `step_seconds`.

    Held-out rows need only the forward pass: its share of a step's compute, and with ZeRO-3 one transfer of the weights
    for each batch.
    """
    batches = math.ceil(load.held_out / (settings.ranks * settings.options.per_device_eval_batch_size))
    passes = _passes(settings) - settings.lora  # nearly all of the work is in the frozen weights
    compute = step["compute"] / passes * load.held_out / settings.global_batch
    gathering = 0.0
    if settings.zero.stage == 3:
        gathering = batches * _transfer_seconds(_all_parameters(model, settings), machine, settings)
    unpacking = batches * _unpacking_seconds(model, machine, settings) / (_passes(settings) - 1)
    host = batches * host_seconds(model, machine, settings) / _passes(settings)
    return max(compute + unpacking + gathering, host)


def cpu_rate(width: int, ranks: int) -> float:
    """Measured FLOP/s of float32 matrix products of the model's width, for each of the ranks that share this CPU.

    Takes well under a second. Above a width of 1024 the rate no longer rises. bfloat16 is not measured, because a small
    model's step does not get faster with it. Imports torch.
    """
    import torch

    rate = matmul_flops_per_second(torch.device("cpu"), torch.float32, width=min(width, 1024))
    cores = usable_cores()
    return rate * min(1.0, cores / (ranks * torch.get_num_threads()))
