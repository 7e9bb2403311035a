"""The operations of a step, counted by hand, and what a device can do."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from training.machine import flops


def test_parameters_are_those_that_multiply():
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=10, n_embd=8, n_layer=2, n_head=2, rotary_dim=4, n_positions=16)
    )
    # A layer: q, k, v, out 4 x 8 x 8; fc_in 8 x 32 + 32; fc_out 32 x 8 + 8; layer norm 16. Then a last norm.
    assert flops.model_parameters(model) == (2 * (256 + 288 + 264 + 16) + 16, 10 * 8 + 10)


def test_a_tied_head_is_counted_as_the_head_alone():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    layers, head = flops.model_parameters(model)
    assert head == 80
    assert layers == sum(p.numel() for p in model.parameters()) - 80


def test_operations_of_two_rows_counted_by_hand():
    # Rows of 3 and 5 tokens, 4 labels, 120 parameters in layers, 20 in the head, width 2, depth 1.
    needed = 120 * 8 - 100 * (8 - 4) + 20 * 4 + 1 * 2 * 34
    assert flops.model_flops(120, 20, 2, 1, 8, 4, 9 + 25) == 6 * needed


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA L40", 181e12),
    ],
)
def test_a_known_gpu_has_its_data_sheets_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_the_rate_of_the_cpu_is_measured():
    assert 1e8 < flops.peak_flops(torch.device("cpu"), torch.float32) < 1e14
