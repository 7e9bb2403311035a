"""FLOPs and times: the formulas against hand-computed cases. CPU times: tests/plan/test_plan_cpu_time.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from tests.conftest import settings_of_a_run
from training.machine import flops
from training.machine.catalogue import find_machine
from training.options.deepspeed import Zero
from training.plan.epoch import alpaca_lengths, epoch_load
from training.plan.lookup import model_shape
from training.plan.model_shape import gptj_shape
from training.plan.timing import run_hours, step_seconds

GPTJ = model_shape("EleutherAI/gpt-j-6B")
TINY = gptj_shape("tiny", layers=2, width=8, heads=2, vocabulary=100)


def test_model_parameters_counts_layers_and_head_without_the_embedding():
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=10, n_embd=8, n_layer=2, n_head=2, rotary_dim=4, n_positions=16)
    )
    # A layer: q, k, v, out 4 x 8 x 8; fc_in 8 x 32 + 32; fc_out 32 x 8 + 8; layer norm 16. Then a last norm.
    assert flops.model_parameters(model) == (2 * (256 + 288 + 264 + 16) + 16, 10 * 8 + 10)


def test_a_tied_embedding_is_counted_once_as_the_head():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    layers, head = flops.model_parameters(model)
    assert head == 80
    assert layers == sum(p.numel() for p in model.parameters()) - 80


def test_flops_of_two_rows_match_a_hand_computed_case():
    # Rows of 3 and 5 tokens, 4 labels, 120 parameters in layers, 20 in the head, width 2, depth 1.
    needed = 120 * 8 - 100 * (8 - 4) + 20 * 4 + 1 * 2 * 34
    assert flops.training_flops(120, 20, 2, 1, flops.layer_tokens(8, 4, 1), 4, 17) == pytest.approx(
        6 * needed
    )


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
def test_a_known_gpu_has_the_peak_of_its_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_flops_match_the_formula_of_narayanan_et_al():
    b, s, layers, h, v = 3, 64, 2, 8, 100
    expected = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    counted = flops.training_flops(layers * 12 * h**2, v * h, h, layers, b * s, b * s, b * s**2, passes=4)
    assert counted == pytest.approx(expected)


def test_seconds_of_a_step_match_a_hand_computed_case():
    machine = find_machine("8xA100-40GB")
    settings = settings_of_a_run(ranks=8, checkpointing=False, zero=Zero(stage=3, offload_optimizer=True))
    load = replace(epoch_load(alpaca_lengths(), settings), slowest_tokens=1000.0, slowest_scores=0.0)
    seconds = step_seconds(GPTJ, machine, settings, load, response_share=0.0)
    tokens_in_layers = 1000 * (1 - 10 / 12 / 28)
    assert seconds["compute"] == pytest.approx(6 * tokens_in_layers * GPTJ.layer_parameters / (312e12 * 0.22))
    assert seconds["gathering"] == pytest.approx(3 * 2 * GPTJ.parameters * 7 / 8 / 200e9)
    assert seconds["optimizer"] == pytest.approx(GPTJ.parameters / 1.2e9)
    checkpointed = step_seconds(
        GPTJ, machine, replace(settings, checkpointing=True), load, response_share=0.0
    )
    assert checkpointed["compute"] == pytest.approx(4 / 3 * seconds["compute"]), (
        "one more forward pass of the layers"
    )
    # Each part of a split share gathers the weights again. Accumulation repeats everything except the optimizer.
    split = step_seconds(GPTJ, machine, replace(settings, max_tokens=400), load, response_share=0.0)
    assert split["gathering"] == pytest.approx(3 * seconds["gathering"])
    accumulated = replace(settings, options=replace(settings.options, gradient_accumulation_steps=2))
    twice = step_seconds(GPTJ, machine, accumulated, load, response_share=0.0)
    assert twice == {
        "compute": 2 * seconds["compute"],
        "gathering": 2 * seconds["gathering"],
        "optimizer": seconds["optimizer"],
    }
    alone = step_seconds(GPTJ, machine, replace(settings, ranks=1), load, response_share=0.0)
    assert alone["gathering"] == 0


def test_hours_of_an_epoch_are_its_steps_and_its_held_out_losses():
    settings = settings_of_a_run(ranks=8, checkpointing=False, test_size=640, eval_steps=50)
    load = replace(epoch_load(alpaca_lengths(), settings), steps=100)
    seconds = {"compute": 3.0, "gathering": 3.0, "optimizer": 0.0}
    # 640 rows are ten batches: ten forward passes of 1 s and ten times one of three gatherings, evaluated three times.
    assert run_hours(GPTJ, settings, load, seconds, 100) == pytest.approx((100 * 6 + 3 * (10 + 10)) / 3600)
