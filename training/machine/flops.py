"""Floating point operations: what a training step needs, and what a device can do. The two halves of the MFU."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from training.machine.catalogue import PEAK_FLOPS
from training.plan.model_shape import ModelFacts


def model_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(parameters of the layers, parameters of the head); the input embedding multiplies nothing.

    Under ZeRO-3 a parameter's own size is 0 while it is not gathered; DeepSpeed keeps the whole size beside it.
    """

    def count(module: torch.nn.Module | None) -> int:
        return 0 if module is None else sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return count(model) - count(embedding) - (0 if tied else count(head)), count(head)


def model_flops(
    layers: int, head: int, width: int, depth: int, tokens: float, labels: float, squared_lengths: float
) -> float:
    """Operations that forward and backward need for these rows, without what is computed twice or on padding.

    Six for every parameter and token (2 forward, 4 backward; Kaplan et al. 2020, section 2.1). Where there is no
    label, the head is not needed, nor are the last layer's queries, output projection and MLP, 10 of the 12 width^2
    of a layer. Causal attention is 6 x depth x width x length^2 a row: scores and weighted values are
    2 x 2 x width x length^2 forward, half of it above the diagonal, and twice that backward.

    Args:
        layers, head: parameters, as `model_parameters` counts them.
        width, depth: of the model.
        tokens, labels: real tokens, and those with a loss.
        squared_lengths: the sum of the squared row lengths.
    """
    not_needed = 10 / 12 * layers / depth * (tokens - labels)
    return 6 * (layers * tokens - not_needed + head * labels + depth * width * squared_lengths)


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


def step_flops(model: ModelFacts, tokens: float, scores: float, labels: float, checkpointing: bool) -> float:
    """Operations of forward and backward.

    Narayanan et al. 2021, section 5.1: a matrix product of n tokens with p weights is 2np operations forward and
    twice that backward; attention is 4 x width a score, and layer; checkpointing adds a second forward of the
    layers. Of b rows of s tokens, with the head everywhere, it is their 96 b s l h^2 (1 + s/6h + V/16lh).

    Args:
        tokens, labels: through the layers, and through the head.
        scores: attention scores of one head, the sum of row length^2 (half of it where causality is used).
    """
    layers = 2 * tokens * model.layer_parameters + 4 * scores * model.width * model.layers
    head = 2 * labels * model.vocabulary * model.width
    return (4 if checkpointing else 3) * layers + 3 * head
