"""Floating point operations: what a training step needs, and what a device can do. The two halves of the MFU."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from training.machine.catalogue import PEAK_FLOPS


def model_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(parameters of the layers, parameters of the head); the input embedding multiplies nothing.

    Under ZeRO-3 a parameter's own size is 0 while it is not gathered; DeepSpeed keeps the whole size beside it.
    """

    def count(module: torch.nn.Module | None) -> int:
        return 0 if module is None else sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return count(model) - count(embedding) - (0 if tied else count(head)), count(head)


# The last layer's queries, output matrix and MLP, 10 of a layer's 12 width^2, are needed only where there is a label.
LAST_LAYER_AT_LABELS = 10 / 12


def layer_tokens(tokens: float, labels: float, depth: int) -> float:
    """Tokens that a layer of a packed GPT-J computes, on average over its `depth` layers (model/attention.py)."""
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
) -> float:
    """Operations of forward and backward.

    A matrix product of n tokens with p weights is 2np operations forward and twice that backward; attention is
    4 x width a score and layer (Narayanan et al. 2021, section 5.1). Of b rows of s tokens, with the head everywhere,
    it is their 96 b s l h^2 (1 + s/6h + V/16lh) for 4 passes.

    Args:
        layers, head: parameters of all layers, and of the head.
        width, depth: of the model.
        tokens: through the layers (`layer_tokens` where the last one is not whole).
        labels: through the head.
        scores: attention scores of one head, the sum of squared row lengths; half of it where causality is used.
        passes: through the layers, in units of a forward: 3, or 4 with checkpointing.
    """
    return passes * (2 * layers * tokens + 4 * scores * width * depth) + 3 * 2 * head * labels


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device can do: of a known GPU its data sheet's peak, else measured."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_FLOPS.items():
            if known in name:
                return peak
    return matmul_flops_per_second(device, dtype)


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, tokens: int = 512, width: int = 2048, runs: int = 5
) -> float:
    """Measured rate of matrix products (tokens, width) @ (width, width), the best of `runs`."""
    a = torch.randn(tokens, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    operations = 2 * tokens * width**2
    repeats = max(1, round(3e8 / operations))  # a short product would measure the clock
    best = float("inf")
    for _ in range(runs):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return repeats * operations / best


def sigmoid_bytes_per_second(runs: int = 1) -> float:
    """Measured rate of float32 sigmoid on the CPU, in bytes of its operand, which lies in the cache; best of `runs`.

    It stands for all elementwise work. A plain copy of memory would tell little: its rate halves when another
    program uses memory, and training's does not. Nor would tanh: torch takes it from MKL, which is slow on AMD's CPUs.
    """
    tensor, repeats, best = torch.randn(2**18), 20, float("inf")
    for _ in range(runs):
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.sigmoid(tensor)
        best = min(best, time.perf_counter() - begin)
    return repeats * tensor.nbytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
