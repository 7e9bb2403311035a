"""Time: formulas on cases worked out by hand, and a measured run on this machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from training.plan.settings import Settings, settings_of

from training.consts import GIB
from training.machine import flops
from training.machine.catalogue import Machine, find_machine
from training.machine.flops import step_flops
from training.options.deepspeed import Zero
from training.options.trainer_options import TrainingOptions
from training.plan.epoch import alpaca_lengths, epoch_load
from training.plan.lookup import dataset_lengths, model_shape
from training.plan.model_shape import gptj_shape
from training.plan.timing import CpuRates, cpu_rates, hours_of, step_seconds

ROOT = Path(__file__).parents[1]
GPTJ = model_shape("EleutherAI/gpt-j-6B")
TINY = gptj_shape("tiny", layers=2, width=8, heads=2, vocabulary=100)
CPU = Machine("this machine", "cpu", "CPU", 1, 0.0, 0.0, "none", 16.0, 100.0)


def test_flops_are_those_of_narayanan_et_al():
    b, s, layers, h, v = 3, 64, 2, 8, 100
    model = replace(TINY, layer_parameters=layers * 12 * h**2)
    expected = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert step_flops(model, b * s, b * s**2, b * s, checkpointing=True) == pytest.approx(expected)
    # and, without anything computed twice, those that the trainer counts for the MFU
    counted = flops.model_flops(model.layer_parameters, v * h, h, layers, b * s, b * s, b * s**2)
    assert step_flops(model, b * s, b * s**2 / 2, b * s, checkpointing=False) == pytest.approx(counted)


def test_a_step_s_seconds_are_worked_out_as_by_hand():
    machine = find_machine("8xA100-40GB")
    settings = Settings(ranks=8, checkpointing=False, zero=Zero(stage=3, offload_optimizer=True))
    load = replace(epoch_load(alpaca_lengths(), settings), slowest_tokens=1000.0, slowest_scores=0.0)
    seconds = step_seconds(GPTJ, machine, settings, load, response_share=0.0)
    but_for_the_last_layer = 1000 * (1 - 10 / 12 / 28)
    assert seconds["compute"] == pytest.approx(
        6 * but_for_the_last_layer * GPTJ.layer_parameters / (312e12 * 0.22)
    )
    assert seconds["gathering"] == pytest.approx(3 * 2 * GPTJ.parameters * 7 / 8 / 200e9)
    assert seconds["optimizer"] == pytest.approx(GPTJ.parameters / 1.2e9)
    # Each part of a split share gathers the weights again; accumulation does everything but the optimizer twice.
    split = step_seconds(GPTJ, machine, replace(settings, max_tokens=400), load, response_share=0.0)
    assert split["gathering"] == pytest.approx(3 * seconds["gathering"])
    twice = step_seconds(GPTJ, machine, replace(settings, accumulation=2), load, response_share=0.0)
    assert twice == {
        "compute": 2 * seconds["compute"],
        "gathering": 2 * seconds["gathering"],
        "optimizer": seconds["optimizer"],
    }
    alone = step_seconds(GPTJ, machine, replace(settings, ranks=1), load, response_share=0.0)
    assert alone["gathering"] == 0


def test_checkpointing_adds_a_third_to_the_layers():
    load = replace(epoch_load(alpaca_lengths(), Settings(ranks=8)), slowest_tokens=1000.0, slowest_scores=0.0)
    once, twice = (
        step_seconds(GPTJ, find_machine("8xH100"), Settings(ranks=8, checkpointing=c), load, 0.0)["compute"]
        for c in (False, True)
    )
    assert twice == pytest.approx(4 / 3 * once)


def test_an_epoch_is_its_steps_and_its_held_out_losses():
    settings = Settings(ranks=8, checkpointing=False, test_size=640, eval_steps=50)
    load = replace(epoch_load(alpaca_lengths(), settings), steps=100)
    seconds = {"compute": 3.0, "gathering": 3.0, "optimizer": 0.0}
    # 640 rows are ten steps' rows: ten forwards of 1 s, and ten times one of three gatherings. Three times.
    assert hours_of(GPTJ, settings, load, seconds, 100) == pytest.approx((100 * 6 + 3 * (10 + 10)) / 3600)


def test_ranks_that_share_a_cpu_share_its_rate(monkeypatch):
    monkeypatch.setattr(flops, "matmul_flops_per_second", lambda *_, **__: 8e9)
    monkeypatch.setattr(flops, "sigmoid_bytes_per_second", lambda: 4e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert cpu_rates(64, "bf16", ranks=1) == CpuRates(8e9, 4e9)
    assert cpu_rates(64, "bf16", ranks=2) == CpuRates(4e9, 2e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cpu_rates(64, "bf16", ranks=2) == CpuRates(8e9, 4e9)


def test_the_rates_of_this_cpu_are_measured():
    rates = cpu_rates(256, "fp32")
    assert 1e8 < rates.matmul < 1e14
    assert 0.01 * GIB < rates.elementwise < 1000 * GIB


# --- against reality ---------------------------------------------------------------------------------


def cpu_seconds(folder: Path, steps: int, *options: str) -> float:
    """CPU seconds of a training of so many steps in one process of one thread, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "training.trainer", "--input-model", "demo", "--training-dataset", "demo",
         "--test-size", "20", "--eval-steps", "100000", "--save-steps", "100000", "--logging-steps", "100000",
         "--max-steps", str(steps), "--local-output-dir", str(folder), *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_predicted_cpu_time_of_an_epoch_is_within_30_percent_of_a_measured_run(
    batching, tmp_path, monkeypatch
):
    typed = ["--batching", batching, "--per-device-train-batch-size", "32", "--gradient-checkpointing", "off"]
    # The rates in CPU seconds as well, of one thread; before, between and after the runs, of which the median counts.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = model_shape("demo")
        rates = [cpu_rates(model.width, "fp32") for _ in range(3)]
        few = cpu_seconds(tmp_path / "few", 10, *typed)
        rates += [cpu_rates(model.width, "fp32") for _ in range(3)]
        many = cpu_seconds(tmp_path / "many", 170, *typed)
        rates += [cpu_rates(model.width, "fp32") for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    middle = CpuRates(median(r.matmul for r in rates), median(r.elementwise for r in rates))
    lengths = dataset_lengths("demo", model)
    options = TrainingOptions(
        local_output_dir="x",
        batching=batching,
        per_device_train_batch_size=32,
        gradient_checkpointing="off",
        test_size=20,
    )
    settings = settings_of(options, 1, "cpu")
    load = epoch_load(lengths, settings)
    step = sum(step_seconds(model, CPU, settings, load, lengths.response_share, middle).values())
    predicted, measured = load.steps * step, load.steps * (many - few) / 160
    print(
        f"\nan epoch of {load.steps} steps: {predicted:.1f} s predicted, {measured:.1f} measured: {predicted / measured:.2f}"
    )
    assert 0.7 < predicted / measured < 1.3
