"""FLOPs of a training step, and peak FLOP/s of a device: the two parts of the MFU."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from training.machine.catalogue import peak_of

if TYPE_CHECKING:  # the plan uses this module without torch
    import torch
    from transformers import PreTrainedModel


def model_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(parameters of the layers, parameters of the head). The input embedding needs no matrix product.

    Of a model with adapters these are the parameters of its frozen base.
    """
    only_frozen = adapter_parameters(model) is not None

    def count(module: torch.nn.Module | None) -> int:
        parameters = [] if module is None else module.parameters()
        return sum(parameter_size(p) for p in parameters if not (only_frozen and p.requires_grad))

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return count(model) - count(embedding) - (0 if tied else count(head)), count(head)


def adapter_parameters(model: PreTrainedModel) -> int | None:
    """Parameters that are trained, of a model with a frozen base; None if every weight is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return None if len(trained) == len(list(model.parameters())) else sum(map(parameter_size, trained))


def parameter_size(parameter: Any) -> int:
    """Numbers in a parameter.

    Under ZeRO-3 the size of one that is not gathered is 0; its full size is in DeepSpeed's `ds_numel`. bitsandbytes keeps
    two numbers of 4 bits in a byte, and their shape in `quant_state`.
    """
    if state := getattr(parameter, "quant_state", None):
        return math.prod(state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


# In the last layer, queries, output matrix and MLP (10 of a layer's 12 width^2) are computed only at labels.
LAST_LAYER_AT_LABELS = 10 / 12


def layer_tokens(tokens: float, labels: float, depth: int) -> float:
    """Tokens computed per layer of a packed GPT-J, averaged over its `depth` layers (model/attention.py)."""
    return tokens - LAST_LAYER_AT_LABELS * (tokens - labels) / depth


def training_flops(
    layers: float,
    head: float,
    width: int,
    depth: int,
    tokens: float,
    labels: float,
    scores: float,
    passes: int = 3,
    adapters: float | None = None,
) -> float:
    """FLOPs of forward and backward.

    A matrix product of n tokens with p weights needs 2np FLOPs forward and twice that backward; attention needs
    4 x width per score and layer (Narayanan et al. 2021, section 5.1). For b rows of s tokens and the head on every
    token, 4 passes give their 96 b s l h^2 (1 + s/6h + V/16lh).

    Args:
        layers, head: parameters of all layers, and of the head.
        width, depth: of the model.
        tokens: computed per layer (`layer_tokens` if the last layer computes only labels).
        labels: tokens computed by the head.
        scores: attention scores of one head: the sum of squared row lengths, or half of it if causality is used.
        passes: cost of the layers in units of a forward pass: 3, or 4 with checkpointing.
        adapters: parameters of the adapters on frozen layers and head; None: every weight is trained. A frozen weight
            has no gradient, which saves one of the two products of its backward pass.
    """
    frozen = 0 if adapters is None else 1  # products that are not computed
    weights = (passes - frozen) * 2 * layers + passes * 2 * (adapters or 0)
    return weights * tokens + passes * 4 * scores * width * depth + (3 - frozen) * 2 * head * labels


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a device: from the data sheet of a known GPU, else the best of products that grow until one would
    take 0.1 s. On a CPU without instructions for bf16 the largest would take a quarter of a minute, at a seventh of the
    rate of a small one.
    """
    import torch

    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = peak_of(torch.cuda.get_device_name(device))
        if known:
            return known
    best = 0.0
    for width in (128, 512, 2048):
        if best and width**3 / 2 / best > 0.1:
            break
        best = max(best, matmul_flops_per_second(device, dtype, tokens=width // 4, width=width))
    return best


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, tokens: int = 512, width: int = 2048
) -> float:
    """Measured FLOP/s of matrix products (tokens, width) @ (width, width), the best of five runs."""
    import torch

    a = torch.randn(tokens, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    operations = 2 * tokens * width**2
    repeats = max(1, round(3e7 / operations))  # a single short product is below the clock's resolution
    best = float("inf")
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return repeats * operations / best


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
