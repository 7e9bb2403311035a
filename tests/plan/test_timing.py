"""FLOPs and times: the formulas against hand-computed cases. CPU times: tests/plan/test_plan_cpu_time.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from tests.conftest import settings_of_a_run
from training.machine import flops
from training.machine.catalogue import find_machine
from training.plan.epoch import alpaca_lengths, epoch_load
from training.plan.lookup import model_shape
from training.plan.timing import evaluation_seconds, host_seconds, step_seconds

GPTJ = model_shape("EleutherAI/gpt-j-6B")


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


@pytest.mark.parametrize(
    ("rates", "widths"),
    [
        ({128: 50e9, 512: 69e9, 2048: 67e9}, [128, 512, 2048]),
        ({128: 1.8e9, 512: 1.2e9}, [128, 512]),  # bf16 without instructions for it
    ],
)
def test_the_peak_of_another_device_is_the_best_of_products_that_end_soon(monkeypatch, rates, widths):
    tried = []

    def measured(device, dtype, tokens, width):
        tried.append(width)
        return rates[width]

    monkeypatch.setattr(flops, "matmul_flops_per_second", measured)
    assert flops.peak_flops(torch.device("cpu"), torch.bfloat16) == max(rates.values())
    assert tried == widths


def test_flops_match_the_formula_of_narayanan_et_al():
    b, s, layers, h, v = 3, 64, 2, 8, 100
    expected = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    counted = flops.training_flops(layers * 12 * h**2, v * h, h, layers, b * s, b * s, b * s**2, passes=4)
    assert counted == pytest.approx(expected)


OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
A100 = find_machine("8xA100-40GB")


def seconds_of(settings, machine=A100, slowest_tokens=1000.0, **load_values):
    """`step_seconds` of GPT-J-6B with labels at no token and without attention scores."""
    load = replace(
        epoch_load(alpaca_lengths(), settings),
        slowest_tokens=slowest_tokens,
        slowest_scores=0.0,
        **load_values,
    )
    return step_seconds(GPTJ, machine, settings, load, response_share=0.0)


def test_seconds_of_a_step_match_a_hand_computed_case():
    settings = settings_of_a_run(ranks=8, checkpointing=False)
    seconds = seconds_of(settings)
    tokens_in_layers = 1000 * (1 - 10 / 12 / 28)
    assert seconds["compute"] == pytest.approx(6 * tokens_in_layers * GPTJ.layer_parameters / (312e12 * 0.5))
    assert seconds["gathering"] == pytest.approx(3 * 2 * GPTJ.parameters * 7 / 8 / 200e9)
    assert seconds["optimizer"] == pytest.approx(GPTJ.parameters / 8 * 60 / (312e12 / 200))
    assert seconds["waiting for the host"] == 0, (
        "28 x 3.9 ms x 1.3 = 0.14 s are less than the device's 0.34 s"
    )
    offloaded = seconds_of(replace(settings, deepspeed=OFFLOADED))
    assert offloaded == seconds | {"optimizer": pytest.approx(GPTJ.parameters / 1.2e9)}
    checkpointed = seconds_of(replace(settings, checkpointing=True))
    assert checkpointed["compute"] == pytest.approx(4 / 3 * seconds["compute"]), "one more forward pass"
    padded = seconds_of(replace(settings, batching="padded"), slowest_tokens=1000)
    assert padded["compute"] > seconds["compute"] / 0.6, "also the head and the last layer at every token"
    assert seconds_of(replace(settings, ranks=1))["gathering"] == 0


def test_accumulation_and_split_shares_repeat_what_happens_in_every_micro_step():
    settings = settings_of_a_run(ranks=8, checkpointing=False)
    once = seconds_of(settings)
    # Each part of a split share gathers the weights again. Accumulation repeats everything except the optimizer.
    assert seconds_of(replace(settings, max_tokens=400))["gathering"] == pytest.approx(3 * once["gathering"])
    accumulated = replace(settings, options=replace(settings.options, gradient_accumulation_steps=2))
    twice = {"compute": 2 * once["compute"], "gathering": 2 * once["gathering"]}
    assert seconds_of(accumulated) == once | twice
    # ZeRO-2 reduces gradients in each micro-step, and gathers the weights once. ZeRO-1 does both once.
    for stage, all_reduce, one_step, two_micro_steps in (
        (2, False, 2, 3), (2, True, 3, 5), (1, False, 2, 2), (1, True, 3, 3), (0, True, 2, 2)
    ):  # fmt: skip
        zero = {"zero_optimization": {"stage": stage, "use_multi_rank_bucket_allreduce": all_reduce}}
        for run, transfers in ((settings, one_step), (accumulated, two_micro_steps)):
            found = seconds_of(replace(run, deepspeed=zero))["gathering"]
            assert found == pytest.approx(transfers / 3 * once["gathering"]), (stage, all_reduce)


def test_a_fast_gpu_waits_for_the_host():
    settings = replace(settings_of_a_run(ranks=8, checkpointing=False), whole_blocks=True)
    fast = replace(A100, family="h100", flops=989.5e12, link="nvlink4")
    seconds = seconds_of(settings, fast, slowest_tokens=100)
    host = host_seconds(GPTJ, fast, settings)
    assert host == pytest.approx(1.3 * 28 * 3.9e-3)
    assert sum(seconds.values()) == pytest.approx(host + seconds["optimizer"]), (
        "the longer of host and device"
    )
    # Half the work of the device changes nothing, as long as the host takes longer.
    assert sum(seconds_of(settings, fast, slowest_tokens=50).values()) == pytest.approx(sum(seconds.values()))
    slow = replace(A100, family="v100", flops=125e12)
    assert host_seconds(GPTJ, slow, settings) == pytest.approx(host + 1.3 * 28 * 8 * 0.11e-3), (
        "one call of attention for each of 8 documents"
    )
    assert host_seconds(GPTJ, replace(A100, family="cpu"), settings) == 0
    by_module = host_seconds(GPTJ, fast, replace(settings, whole_blocks=False))
    assert by_module == pytest.approx(1.3 * 28 * 9.2e-3), "DeepSpeed's hooks on every module"


def test_an_evaluation_is_a_forward_pass_of_the_held_out_rows():
    settings = settings_of_a_run(ranks=8, checkpointing=False, test_size=640)
    settings = replace(settings, whole_blocks=True)
    load = epoch_load(alpaca_lengths(), settings)
    step = {"compute": 6.0}
    # 640 rows are ten batches of 64 rows: 2 s each, and one transfer of the weights each.
    expected = 20 + 10 * 2 * GPTJ.parameters * 7 / 8 / 200e9
    assert evaluation_seconds(GPTJ, A100, settings, load, step) == pytest.approx(expected)
    bound_by_host = evaluation_seconds(GPTJ, A100, settings, load, {"compute": 0.0})
    assert bound_by_host == pytest.approx(10 * max(1.3 * 28 * 3.9e-3 / 3, (expected - 20) / 10))
