"""Predicts device memory, host memory and disk of a run, in GiB.

Without a GPU a device is a CPU rank, and its memory is part of host memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from training.consts import GIB, LOSS_CHUNK_BYTES
from training.options.deepspeed import LARGEST_BUCKET, Zero, bucket_sizes
from training.plan.adapter import Adapter, adapter_of, frozen_bytes, trained_parameters

if TYPE_CHECKING:
    from training.options.settings import Settings
    from training.plan.epoch import Load
    from training.plan.model_shape import ModelShape

# CUDA context, kernels, NCCL buffers and cuBLAS workspaces, which PyTorch does not count: 0.4 to 0.5 GiB for the
# context of an A100, about 0.5 GiB for NCCL over 8 GPUs. An assumption, not measured here.
CUDA_CONTEXT_GIB = 1.25

# Share of temporary memory that the caching allocator holds in blocks that fit no request. An assumption.
FRAGMENTATION = 0.1
CPU_PROCESS_GIB = 0.7  # a CPU rank of the trainer on the demo's tiny model: measured 0.72 to 0.74

# Python, torch with its CUDA libraries, NCCL and the data of a GPU rank. A conservative assumption.
GPU_PROCESS_GIB = 3.0
DATASET_CACHE_GIB = 0.5  # Alpaca's takes 0.03; an allowance


def state_bytes(model: ModelShape, settings: Settings) -> dict[str, float]:
    """Bytes on a device for all of training: weights, gradients, optimizer.

    ZeRO (Rajbhandari et al. 2020, section 5): per parameter 2 bytes for 16-bit weights, 2 for gradients, and 12 for
    float32 master weights and Adam's two moments. They are divided by the number of ranks from stage 3, 2 and 1 on. In
    float32 the weights are the master weights: 4 + 4 + 8. DeepSpeed accumulates gradients in the model's precision in
    one flat buffer (`grad_partitions_flat_buffer` in stage3.py), which is in host memory if the optimizer is offloaded.
    Stage 2 adds up two such buffers if a step has several micro-steps (`all_grad_tensors` in stage_1_and_2.py).

    With an adapter this holds for its parameters, which are float32 without DeepSpeed. The frozen weights have neither
    gradient nor optimizer; stage 3 divides them too.
    """
    zero, adapter = settings.zero, adapter_of(model, settings)
    size = 4 if adapter and not zero.stage else settings.weight_bytes
    adds_up = zero.stage == 2 and (settings.accumulation > 1 or isinstance(settings.max_tokens, int))
    trained = adapter.parameters if adapter else model.parameters
    ranks = {stage: settings.ranks if zero.stage >= stage else 1 for stage in (1, 2, 3)}
    frozen = 0.0 if zero.offload_parameters else frozen_bytes(model, settings) / ranks[3]
    return {
        **({"frozen weights": frozen} if adapter else {}),
        "adapter" if adapter else "weights": 0.0 if zero.offload_parameters else size * trained / ranks[3],
        "gradients": 0.0 if zero.offload_optimizer else (2 if adds_up else 1) * size * trained / ranks[2],
        "optimizer": 0.0 if zero.offload_optimizer else (8 if size == 4 else 12) * trained / ranks[1],
    }


def layer_bytes(model: ModelShape, tokens: float, row: int, size: int, packed: bool) -> float:
    """Bytes that one layer keeps for its backward pass. `row` is the padded row length, `size` the bytes per number.

    Counted tensor by tensor in transformers' GPTJBlock and training/model/attention.py, in units of a (tokens, width)
    tensor:
      both      input, normed input, value, attention's output                          4
      padded    query and key, in float32                                               2 of float32
                scores after the softmax, in float32 and in 16 bit: heads x row per token
                gelu_new as five elementwise functions: 5 (tokens, inner) tensors
      packed    query, key, and the concatenated output                                 3
                gelu as one kernel: 2 (tokens, inner) tensors
    Other models: Korthikanti et al. 2022, equation 1, without scores and dropout masks (17 x width in total), with
    4 instead of 2 inner tensors for gated MLPs.
    """
    if model.kind != "gptj":
        return tokens * size * (9 * model.width + (4 if model.gated else 2) * model.inner)
    if packed:
        return tokens * size * (7 * model.width + 2 * model.inner)
    scores = model.heads * row * (4 if size == 4 else 6)
    return tokens * (size * (4 * model.width + 5 * model.inner) + 8 * model.width + scores)


def loss_bytes(
    model: ModelShape, tokens: float, labels: float, size: int, packed: bool, frozen: bool = False
) -> float:
    """Peak bytes of the logits, their gradient and the loss's other tensors.

    The plain loss holds three float32 tensors (tokens, vocabulary) when its backward pass starts: log-probabilities,
    their gradient, and the gradient of the logits. Our loss (training/model/loss.py) holds one chunk, also in 16 bit,
    and the full gradient of the head, unless it is `frozen`.
    """
    if not (packed and model.response_loss):
        return 12 * (labels if packed else tokens) * model.vocabulary
    chunk = min(labels, LOSS_CHUNK_BYTES // (4 * model.vocabulary))
    rows = labels if frozen else model.vocabulary + labels
    return chunk * model.vocabulary * (4 if size == 4 else 4 + size) + size * model.width * rows


def activation_bytes(
    model: ModelShape,
    tokens: float,
    row: int,
    labels: float,
    size: int,
    packed: bool,
    checkpointing: bool,
    adapter: Adapter | None = None,
) -> tuple[float, float]:
    """(activations, logits and loss) in bytes at the moment when their sum peaks.

    Without checkpointing every layer keeps its tensors until its backward pass. With it only the layers' inputs are
    kept (Chen et al. 2016), and one layer at a time is recomputed. The peak is either at the loss, when all layers are
    stored and the logits exist, or in the backward pass of a layer, which needs a few more (tokens, width) tensors
    (4 packed, 6 padded, measured).
    """
    layer = layer_bytes(model, tokens, row, size, packed)
    layer += adapter.kept_bytes(tokens, size) / model.layers if adapter else 0.0
    stored = model.layers * (tokens * model.width * size if checkpointing else layer)
    backward = (layer if checkpointing else 0) + (4 if packed else 6) * tokens * model.width * size
    loss = loss_bytes(model, tokens, labels, size, packed, frozen=adapter is not None)
    return (stored, loss) if loss > backward else (stored + backward, 0.0)


def peak_activation_bytes(
    model: ModelShape, settings: Settings, load: Load, response_share: float, checkpointing: bool
) -> tuple[float, float]:
    """`activation_bytes` of the largest share of rows that a device computes at once."""
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
        adapter_of(model, settings),
    )


def whole_blocks_possible(model: ModelShape, settings: Settings) -> bool:
    """Whether DeepSpeed can gather and reduce a block at a time. A file that chooses leaf modules itself is obeyed."""
    zero = settings.zero
    return zero.stage > 0 and 0 < model.block <= LARGEST_BUCKET and not zero.leaf_threshold


def bucket_parameters(model: ModelShape, settings: Settings, cpu: bool) -> float:
    """Parameters whose gradients fit into a bucket."""
    bucket = settings.zero.bucket or (model.block if settings.whole_blocks is True else model.width**2)
    # The system gives memory only to the part of a bucket that is written.
    return min(bucket, trained_parameters(model, settings)) if cpu else bucket


def communication_bytes(model: ModelShape, settings: Settings, cpu: bool) -> float:
    """Bytes of weights and gradients in transit, beyond the gathered layers.

    With ZeRO: the bucket and the largest gradient, which is the embedding's unless it is frozen. Stages 1 and 2 fill a
    second bucket meanwhile (stage_1_and_2.py, setup_buckets). With whole blocks ZeRO-3 also copies the gradients of a
    bucket before it reduces them (`reduce_scatter_coalesced`), and gathers a prefetched block into a buffer from which its
    weights are copied (`AllGatherCoalescedHandle.wait`). Without ZeRO torch's DistributedDataParallel copies all gradients
    into buckets.
    """
    zero, size, whole = settings.zero, settings.number_bytes, settings.whole_blocks is True
    adapter = adapter_of(model, settings)
    if not zero.stage:
        return 4 * trained_parameters(model, settings) if settings.ranks > 1 else 0.0
    bucket = bucket_parameters(model, settings, cpu)
    largest = adapter.largest if adapter else model.vocabulary * model.width
    if zero.stage < 3:
        return size * (2 * bucket + largest)
    if not whole:
        return size * (bucket + largest)
    prefetched = zero.prefetch or bucket_sizes(model.block)["stage3_prefetch_bucket_size"]
    buffer = prefetched + max(model.width * model.inner, model.width**2) if settings.ranks > 1 else 0
    return size * (bucket + min(bucket, model.block) + max(largest, model.block) + buffer)


def device_memory(
    model: ModelShape, settings: Settings, load: Load, response_share: float, cpu: bool = False
) -> dict[str, float]:
    """Peak GiB of one device in a step, by part. The device must have their sum.

    "unpacked layer": the largest layer of 4-bit weights, in 16 bits: bitsandbytes unpacks one at a time.
    "gathered layers": ZeRO-3 prefetches until stage3_max_live_parameters are gathered, and exceeds the limit by one
    parameter, and by a block if it gathers whole blocks (measured on two ranks). The forward pass of a larger model always
    reaches the limit, because every module requests the next bucket, even a module without parameters (`fetch_sub_module`
    in partitioned_param_coordinator.py; measured on real ranks). A single rank holds all weights anyway. Without ZeRO this
    part is autocast's 16-bit copy of the weights; a frozen base is in 16 bits anyway.
    "communication": `communication_bytes`.
    "optimizer step": float32 copies of the gradients, and 16-bit ones on the way (DeepSpeed copies one sub-group at a
    time, at stages 1 and 2 a rank's whole shard), beyond the memory that activations, logits, gathered layers and buckets
    have freed by then. Stage 3 keeps its bucket.
    """
    zero, size = settings.zero, settings.number_bytes
    activations, loss = peak_activation_bytes(
        model, settings, load, response_share, settings.checkpointing is True
    )
    parts = state_bytes(model, settings)
    gathered, communication = 0.0, communication_bytes(model, settings, cpu)
    if zero.stage == 3 and (settings.ranks > 1 or zero.offload_parameters):
        largest = model.width * max(model.vocabulary, model.inner)
        if settings.whole_blocks is True:
            largest += model.block
        gathered = size * min(model.parameters, zero.live_parameters + largest)
    elif zero.stage == 0 and size == 2 and not settings.lora:
        gathered = size * model.parameters
    freed = activations + loss + gathered + communication
    step = 0.0
    if zero.stage and size == 2 and not zero.offload_optimizer:
        shard = trained_parameters(model, settings) / settings.ranks
        copies = (4 + size) * (min(shard, zero.sub_group) if zero.stage == 3 else shard)
        kept = size * bucket_parameters(model, settings, cpu) if zero.stage == 3 else 0.0
        step = max(0.0, copies - (freed - kept))
    unpacked = (
        max((layer.parameters for layer in model.linears), default=0) if settings.options.quantize else 0
    )
    parts |= {
        "gathered layers": gathered,
        **({"unpacked layer": size * unpacked} if unpacked else {}),
        "activations": activations,
        "logits and loss": loss,
        "communication": communication,
        "optimizer step": step,
    }
    fixed = CPU_PROCESS_GIB if cpu else CUDA_CONTEXT_GIB
    return {name: value / GIB for name, value in parts.items()} | {
        "context and fragmentation": fixed + FRAGMENTATION * freed / GIB
    }


def with_fastest_choices(
    model: ModelShape,
    settings: Settings,
    load: Load,
    response_share: float,
    memory_gib: float,
    cpu: bool = False,
) -> Settings:
    """`settings` with "auto" of checkpointing and whole blocks replaced by the fastest choice that fits.

    The smallest choice if none fits. Recomputing activations takes a third more time, which is more than the hooks of
    all modules. It comes before splitting a share, because each part of a split share gathers all weights again.
    """
    recompute = [settings.checkpointing is True]
    if settings.checkpointing == "auto":
        recompute = [False, True] if model.checkpointing else [False]
    whole = [settings.whole_blocks is True]
    if settings.whole_blocks == "auto":
        whole = [True, False]
    if not whole_blocks_possible(model, settings):
        whole = [False]
    choices = [replace(settings, checkpointing=on, whole_blocks=units) for on in recompute for units in whole]
    for choice in choices:
        if sum(device_memory(model, choice, load, response_share, cpu).values()) <= memory_gib:
            return choice
    return choices[-1]


def auto_max_tokens_per_device(
    model: ModelShape,
    settings: Settings,
    load: Load,
    response_share: float,
    memory_gib: float,
    cpu: bool = False,
) -> int | None:
    """The most packed tokens that fit on a device at once; None if the largest share fits.

    At least the length of the longest row, because a row cannot be split, even if it does not fit.
    """

    def fits(tokens: int) -> bool:
        limited = replace(settings, max_tokens=tokens)
        return sum(device_memory(model, limited, load, response_share, cpu).values()) <= memory_gib

    low, high = load.peak_row, load.peak_tokens
    if not settings.packed or fits(high):
        return None
    while high - low > 8:  # bisection: memory grows with the tokens
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def host_memory(
    model: ModelShape, settings: Settings, local_ranks: int | None = None, cpu: bool = False
) -> dict[str, float]:
    """Host GiB while "loading", "training" and, with an adapter, "merging", for `local_ranks` ranks on a machine (all ranks if None).

    Loading: with ZeRO-3 only rank 0 reads the file (transformers' `_load_state_dict_into_zero3_model`), and every rank
    keeps its shard on its device. Otherwise every rank holds a full model until it is on the device: in 16 bit at stages
    1 and 2, else in float32. The ranks of a machine map the file and share its pages. With ZeRO the full file is counted,
    although the system could reclaim them. Measured on one rank, a float32 file: the file's pages and 2 bytes a parameter.

    Training: an offloaded optimizer holds per parameter float32 master weights (4 bytes), moments (8), and two copies
    of the gradients, in float32 (4) and in the model's precision (2). If pinned, the two copies are rounded up to a
    power of two, because PyTorch's pinned memory allocator does so (ATen/core/CachingHostAllocator.h). Saving stages the
    devices' float32 states (4): an assumption. At the end rank 0 loads the finished model to verify it (2).

    Merging: rank 0 loads the base in the run's precision, and adds one layer's product in float32 at a time. A base in
    4 bits is loaded onto the device a tensor at a time.
    """
    zero, count, size = settings.zero, model.parameters, settings.weight_bytes
    local, trained = local_ranks or settings.ranks, trained_parameters(model, settings)
    shards = trained * local / settings.ranks
    processes = local * (CPU_PROCESS_GIB if cpu else GPU_PROCESS_GIB)
    whole = (
        size * max(layer.parameters for layer in model.linears) if settings.options.quantize else size * count
    )
    loading = (model.file_bytes if zero.stage else 0) + (0 if zero.stage == 3 else local * whole)
    training = 0.0
    if zero.offload_optimizer:
        buffers = offloaded_gradient_bytes(model, settings)
        training += 12 * shards + local * sum(_pinned(buffer, zero) for buffer in buffers)
    if zero.offload_parameters:
        training += size * count * local / settings.ranks
    saving = 0 if zero.offload_optimizer or cpu else 4 * shards
    if not settings.lora:  # the same model is loaded when it is verified
        saving = max(size * count, saving)
    phases = {"loading": loading, "training": training + saving}
    if settings.lora:
        phases["merging"] = size * count + 4 * max(layer.parameters for layer in model.linears)
    return {phase: processes + needed / GIB for phase, needed in phases.items()}


def offloaded_gradient_bytes(model: ModelShape, settings: Settings) -> list[float]:
    """Bytes of a rank's gradient buffers with an offloaded optimizer.

    One float32 buffer per sub-group, then the flat buffer in the model's precision. A sub-group has at least one
    parameter (`_create_fp16_sub_groups` in stage3.py), also if the file sets sub_group_size to 0.
    """
    shard = trained_parameters(model, settings) / settings.ranks
    group = max(settings.zero.sub_group, model.width**2 / settings.ranks)
    full = math.ceil(shard / group) - 1
    return [4 * group] * full + [4 * (shard - full * group), settings.number_bytes * shard]


def _pinned(size: float, zero: Zero) -> float:
    return 2.0 ** math.ceil(math.log2(size)) if zero.pinned else size


def disk(model: ModelShape, settings: Settings, steps: int) -> dict[str, float]:
    """Disk GiB of a run of `steps` steps: cache (download and tokenised rows), checkpoints, model.

    A new checkpoint is complete before the oldest is deleted, and one that is being copied to --checkpoint-to stays. The
    last step also writes a checkpoint.
    """
    assert settings.options.save_steps is not None, "a time was turned into steps"
    in_transit = settings.options.checkpoint_to is not None
    kept = min(
        settings.options.save_total_limit + 1 + in_transit, math.ceil(steps / settings.options.save_steps)
    )
    return {
        "cache": (model.file_bytes / GIB if model.downloaded else 0.0) + DATASET_CACHE_GIB,
        "checkpoints": kept * settings.checkpoint_bytes * trained_parameters(model, settings) / GIB,
        "model": (settings.weight_bytes * model.parameters + _adapter_folder_bytes(model, settings)) / GIB,
    }


def _adapter_folder_bytes(model: ModelShape, settings: Settings) -> float:
    """Bytes of adapter/ in the finished folder: a head with a bias is in it as a whole (run/merging.py)."""
    adapter = adapter_of(model, settings)
    if adapter is None:
        return 0.0
    return 4 * adapter.parameters + settings.number_bytes * model.head_bias * model.vocabulary * model.width


def remote_gib(model: ModelShape, settings: Settings, steps: int) -> dict[str, float]:
    """GiB that a run of `steps` steps copies to --checkpoint-to, if no checkpoint is skipped; {} without it."""
    options = settings.options
    if options.checkpoint_to is None:
        return {}
    size = settings.checkpoint_bytes * trained_parameters(model, settings) / GIB
    # A new one is complete before the oldest is removed.
    answer = {"a checkpoint": size, "kept there, at most": (options.save_total_limit + 1) * size}
    if options.save_steps is not None:
        answer["all, at most"] = math.ceil(steps / options.save_steps) * size
    return answer
