"""The memory of a device by part, the host memory while loading and training, and the disk that a run needs, in GiB.

Without a GPU a device is a CPU rank, whose memory is part of the host's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from training.consts import GIB, LOSS_CHUNK_BYTES

if TYPE_CHECKING:
    from training.options.deepspeed import Zero
    from training.options.settings import Settings
    from training.plan.epoch import Load
    from training.plan.model_shape import ModelShape

# The context, the kernels, NCCL's buffers and cuBLAS's workspaces, which PyTorch does not count: 0.4 to 0.5 GiB
# for the context of an A100, some 0.5 GiB for NCCL over 8 GPUs. An assumption, not measured here.
CUDA_CONTEXT_GIB = 1.25

# Of the memory that comes and goes: what the caching allocator keeps in blocks that fit no request. An assumption.
FRAGMENTATION = 0.1
CPU_PROCESS_GIB = 0.7  # a CPU rank of the trainer on the demo, whose model is tiny: measured 0.72 to 0.74

# Python, torch with its CUDA libraries, NCCL and the data of a GPU rank. A careful assumption.
GPU_PROCESS_GIB = 3.0
DATASET_CACHE_GIB = 0.5  # Alpaca's takes 0.03; an allowance


def state_bytes(model: ModelShape, settings: Settings) -> dict[str, float]:
    """Bytes that stay on a device through training: weights, gradients, optimizer.

    ZeRO (Rajbhandari et al. 2020, section 5): 2 bytes a parameter for 16-bit weights, 2 for gradients, 12 for the
    float32 master weights and Adam's two moments, each divided by the ranks from stage 3, 2 and 1 on. In float32
    the weights are the masters: 4 + 4 + 8. DeepSpeed accumulates gradients in the model's precision, in one flat
    buffer (`grad_partitions_flat_buffer` in stage3.py); with the optimizer offloaded it is in host memory.
    """
    zero, size = settings.zero, settings.weight_bytes
    shard = {stage: model.parameters / (settings.ranks if zero.stage >= stage else 1) for stage in (1, 2, 3)}
    return {
        "weights": 0.0 if zero.offload_parameters else size * shard[3],
        "gradients": 0.0 if zero.offload_optimizer else size * shard[2],
        "optimizer": 0.0 if zero.offload_optimizer else (8 if size == 4 else 12) * shard[1],
    }


def layer_bytes(model: ModelShape, tokens: float, row: int, size: int, packed: bool) -> float:
    """Bytes that one layer keeps for its backward pass; `row` is the padded row length, `size` bytes a number.

    Counted tensor by tensor in transformers' GPTJBlock and training/model/attention.py, in units of a (tokens, width)
    tensor:
      both      input, normed input, value, attention's output                          4
      padded    query and key, in float32                                               2 of float32
                scores after the softmax, float32, and again in 16 bit: heads x row a token
                gelu_new as five elementwise functions: 5 (tokens, inner) tensors
      packed    query, key, and the output again, concatenated                          3
                gelu as one kernel: 2 (tokens, inner) tensors
    Other models: Korthikanti et al. 2022, equation 1, without scores and dropout masks (17 x width in all),
    4 instead of 2 inner tensors for gated MLPs.
    """
    if model.kind != "gptj":
        return tokens * size * (9 * model.width + (4 if model.gated else 2) * model.inner)
    if packed:
        return tokens * size * (7 * model.width + 2 * model.inner)
    scores = model.heads * row * (4 if size == 4 else 6)
    return tokens * (size * (4 * model.width + 5 * model.inner) + 8 * model.width + scores)


def loss_bytes(model: ModelShape, tokens: float, labels: float, size: int, packed: bool) -> float:
    """Bytes of the logits, their gradient, and what the loss makes of them, at the worst moment.

    The plain loss holds three float32 tensors (tokens, vocabulary) as its backward begins: log-probabilities,
    their gradient, the logits' gradient. Ours (training/model/loss.py) holds one chunk, in 16 bit as well, and the
    head's whole gradient.
    """
    if model.kind != "gptj" or not packed:
        return 12 * (labels if packed else tokens) * model.vocabulary
    chunk = min(labels, LOSS_CHUNK_BYTES // (4 * model.vocabulary))
    return chunk * model.vocabulary * (4 if size == 4 else 4 + size) + size * model.width * (
        model.vocabulary + labels
    )


def activation_bytes(
    model: ModelShape, tokens: float, row: int, labels: float, size: int, packed: bool, checkpointing: bool
) -> tuple[float, float]:
    """(activations, logits and loss) at the moment when both together are most.

    Without checkpointing every layer keeps its tensors until its backward. With it only the layers' inputs are
    kept (Chen et al. 2016), and one layer's tensors are made again at a time. That moment is either the loss,
    when all is stored and the logits exist, or the backward of a layer, which needs some (tokens, width) tensors
    more (4 packed, 6 padded, measured).
    """
    layer = layer_bytes(model, tokens, row, size, packed)
    stored = model.layers * (tokens * model.width * size if checkpointing else layer)
    backward = (layer if checkpointing else 0) + (4 if packed else 6) * tokens * model.width * size
    loss = loss_bytes(model, tokens, labels, size, packed)
    return (stored, loss) if loss > backward else (stored + backward, 0.0)


def peak_activation_bytes(
    model: ModelShape, settings: Settings, load: Load, response_share: float, checkpointing: bool
) -> tuple[float, float]:
    """`activation_bytes` of the largest share of rows that a device computes at once in this run."""
    tokens = load.peak_tokens
    if isinstance(settings.max_tokens, int):
        tokens = max(min(tokens, settings.max_tokens), load.peak_row)  # a row cannot be split
    return activation_bytes(
        model,
        tokens,
        load.peak_row,
        tokens * response_share,
        settings.number_bytes,
        settings.packed,
        checkpointing,
    )


def device_memory(
    model: ModelShape, settings: Settings, load: Load, response_share: float, cpu: bool = False
) -> dict[str, float]:
    """GiB of one device by part, at the worst moment of a step; their sum is what the card must have.

    "gathered layers": ZeRO-3 gathers ahead until stage3_max_live_parameters are whole, and passes the limit by a
    parameter. Every forward of a larger model reaches it, because every module requests the next bucket, with
    parameters or without (`fetch_sub_module` in partitioned_param_coordinator.py; measured on real ranks). A single
    rank holds its weights whole anyway. Without ZeRO these are autocast's 16-bit copies of the weights.
    "communication": gradients in transit. Under ZeRO a bucket and the largest whole gradient, the embedding's;
    without it torch's DistributedDataParallel copies all into buckets.
    "optimizer step": the float32 copy of the gradients (DeepSpeed makes one for each sub-group), as far as it exceeds
    the memory that activations, logits and gathered layers have freed by then.
    """
    zero, size = settings.zero, settings.number_bytes
    activations, loss = peak_activation_bytes(
        model, settings, load, response_share, settings.checkpointing is True
    )
    parts = state_bytes(model, settings)
    gathered = communication = 0.0
    if zero.stage == 3 and (settings.ranks > 1 or zero.offload_parameters):
        largest = model.width * max(model.vocabulary, model.inner)
        gathered = size * min(model.parameters, zero.live_parameters + largest)
    elif zero.stage == 0 and size == 2:
        gathered = size * model.parameters
    if zero.stage:
        communication = size * ((zero.bucket or model.width**2) + model.vocabulary * model.width)
    elif settings.ranks > 1:
        communication = settings.weight_bytes * model.parameters
    freed = activations + loss + gathered + communication
    step = 0.0
    if zero.stage and size == 2 and not zero.offload_optimizer:
        step = max(0.0, (4 + size) * min(model.parameters / settings.ranks, zero.sub_group) - freed)
    parts |= {
        "gathered layers": gathered,
        "activations": activations,
        "logits and loss": loss,
        "communication": communication,
        "optimizer step": step,
    }
    fixed = CPU_PROCESS_GIB if cpu else CUDA_CONTEXT_GIB
    return {name: value / GIB for name, value in parts.items()} | {
        "context and fragmentation": fixed + FRAGMENTATION * freed / GIB
    }


def auto_gradient_checkpointing(
    model: ModelShape,
    settings: Settings,
    load: Load,
    response_share: float,
    memory_gib: float,
    cpu: bool = False,
) -> bool:
    """Whether layers must be computed twice, because the largest share of rows does not fit otherwise.

    This is decided before a share is split, which gathers all weights once more for each part.
    """
    without = replace(settings, checkpointing=False)
    return sum(device_memory(model, without, load, response_share, cpu).values()) > memory_gib


def auto_max_tokens_per_device(
    model: ModelShape,
    settings: Settings,
    load: Load,
    response_share: float,
    memory_gib: float,
    cpu: bool = False,
) -> int | None:
    """The most packed tokens that fit on a device at once; None if the largest share fits whole.

    At least the longest row, which cannot be split, whether it fits or not.
    """

    def fits(tokens: int) -> bool:
        tried = replace(settings, max_tokens=tokens)
        return sum(device_memory(model, tried, load, response_share, cpu).values()) <= memory_gib

    low, high = load.peak_row, load.peak_tokens
    if not settings.packed or fits(high):
        return None
    while high - low > 8:  # memory grows with the tokens, so a bisection finds the limit
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def host_memory(
    model: ModelShape, settings: Settings, local_ranks: int | None = None, cpu: bool = False
) -> dict[str, float]:
    """GiB of host memory "loading" and "training", of the `local_ranks` ranks (all if None) on a machine.

    Loading: under ZeRO-3 rank 0 alone reads the file (transformers' `_load_state_dict_into_zero3_model`), and
    every rank keeps its shard on its device; without it every rank holds a whole float32 model. The file is counted
    whole, though the system could take back the pages of a mapped one.

    Training: with the optimizer offloaded float32 masters (4 bytes a parameter) and moments (8), and two copies of
    the gradients, float32 (4) and in the model's precision (2). If pinned, these two take the next power of two,
    because PyTorch's allocator of pinned memory rounds so (ATen/core/CachingHostAllocator.h). Saving gathers the
    16-bit model on rank 0 (2), and stages float32 states of the devices (4): an assumption.
    """
    zero, count, size = settings.zero, model.parameters, settings.weight_bytes
    local = local_ranks or settings.ranks
    shards = count * local / settings.ranks
    processes = local * (CPU_PROCESS_GIB if cpu else GPU_PROCESS_GIB)
    loading = model.file_bytes if zero.stage == 3 else local * 4 * count
    training = 0.0
    if zero.offload_optimizer:
        buffers = offloaded_gradient_bytes(model, settings)
        training += 12 * shards + local * sum(_pinned(buffer, zero) for buffer in buffers)
    if zero.offload_parameters:
        training += size * shards
    saving = max(size * count, 0 if zero.offload_optimizer or cpu else 4 * shards)
    return {"loading": processes + loading / GIB, "training": processes + (training + saving) / GIB}


def offloaded_gradient_bytes(model: ModelShape, settings: Settings) -> list[float]:
    """Bytes of each gradient buffer of a rank with an offloaded optimizer: one a sub-group in float32, and the flat
    one in the model's precision."""
    shard, group = model.parameters / settings.ranks, settings.zero.sub_group
    full = math.ceil(shard / group) - 1
    return [4 * group] * full + [4 * (shard - full * group), settings.number_bytes * shard]


def _pinned(size: float, zero: Zero) -> float:
    return 2.0 ** math.ceil(math.log2(size)) if zero.pinned else size


def disk(model: ModelShape, settings: Settings, steps: int) -> dict[str, float]:
    """GiB on disk of a run of `steps` steps: the download and the tokenised rows, checkpoints, the model.

    A new checkpoint is complete before the oldest is deleted; the last step has one of its own.
    """
    kept = min(settings.options.save_total_limit + 1, math.ceil(steps / settings.options.save_steps))
    return {
        "cache": (model.file_bytes / GIB if model.downloaded else 0.0) + DATASET_CACHE_GIB,
        "checkpoints": kept * settings.checkpoint_bytes * model.parameters / GIB,
        "model": settings.weight_bytes * model.parameters / GIB,
    }
