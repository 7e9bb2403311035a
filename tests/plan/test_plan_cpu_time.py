"""Predicted CPU times: the rate shared by ranks, and the demo against a measured run on this machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.consts import DEMO, ROOT
from training.launch.local import deepspeed_command, launch_environment
from training.machine import flops
from training.machine.catalogue import Machine
from training.options.command_line import option_words
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.plan import fit, timing
from training.plan.epoch import alpaca_lengths, epoch_load
from training.plan.fit import plan_run
from training.plan.lookup import dataset_lengths, model_shape
from training.plan.presets import demo_options
from training.plan.timing import CPU_RANGE, cpu_rate, step_seconds

BF16 = "config/ds_z3_bf16_config.json"
CPU = Machine("this machine", "cpu", "CPU", 2, 0.0, 0.0, "none", 16.0, 100.0)
MODEL = model_shape(DEMO)


def test_ranks_on_one_cpu_share_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "matmul_flops_per_second", lambda *_, **__: 8e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert cpu_rate(64, ranks=1) == 8e9
    assert cpu_rate(64, ranks=2) == 4e9
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cpu_rate(64, ranks=2) == 8e9


def test_the_measured_rate_of_this_cpu_is_plausible() -> None:
    assert 1e8 < cpu_rate(128, ranks=1) < 1e14


def test_a_cpu_is_measured_once_and_not_at_all_if_its_speed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainingOptions(local_output_dir="x", **demo_options(2))
    settings, widths = resolve(options, 2, "fp32"), []
    monkeypatch.setattr(fit, "cpu_rate", lambda width, ranks: widths.append((width, ranks)) or 1e11)
    slow = plan_run(settings, alpaca_lengths(), MODEL, replace(CPU, host_gib=0.1))
    assert widths == [(128, 2)], "measured once, although several options were planned"
    assert plan_run(settings, alpaca_lengths(), MODEL, replace(CPU, flops=2e11)).step_seconds[
        "compute"
    ] == pytest.approx(slow.step_seconds["compute"] / 2)
    assert len(widths) == 1


def cpu_seconds(folder: Path, ranks: int, steps: int, batching: str) -> float:
    """CPU seconds per rank of a training run with one thread per rank, independent of other load."""
    chosen = demo_options(ranks) | {"batching": batching, "test_size": 20, "per_device_eval_batch_size": 20}
    chosen |= {"max_steps": steps, "eval_steps": 10**5, "local_output_dir": str(folder)}
    words = [sys.executable, "-m", "training.trainer", *option_words(chosen)]
    environment = dict(os.environ)
    if ranks > 1:
        words = deepspeed_command(chosen | {"deepspeed": BF16}, ranks)
        environment = launch_environment(ranks)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        words, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / ranks


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "batching"), [(1, "packed"), (1, "padded"), (2, "packed"), (2, "padded")])
def test_the_predicted_step_time_of_the_demo_is_within_the_stated_range(
    ranks: int, batching: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (cpu_seconds(tmp_path / str(steps), ranks, steps, batching) for steps in (5, 45))
    # Measure the rate in CPU seconds of one thread, too.
    monkeypatch.setattr(flops.time, "perf_counter", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = cpu_rate(MODEL.width, ranks=1)
    finally:
        torch.set_num_threads(threads)
    options = TrainingOptions(
        **demo_options(ranks)
        | {"batching": batching, "test_size": 20, "local_output_dir": "x"}
        | {"deepspeed": BF16 if ranks > 1 else None}
    )
    settings = resolve(options, ranks, "fp32").with_plan_choices(False, None, batching)
    lengths = dataset_lengths(options, MODEL)
    load = epoch_load(lengths, settings)
    seconds = step_seconds(MODEL, replace(CPU, flops=rate), settings, load, lengths.response_share)
    predicted, measured = sum(seconds.values()), (many - few) / 40
    print(f"\na step: {predicted:.3f} s predicted, {measured:.3f} measured: {predicted / measured:.2f}")
    assert 1 / CPU_RANGE < predicted / measured < CPU_RANGE
