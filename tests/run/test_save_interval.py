"""A time between checkpoints becomes steps once, and a resumed run keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import jsonl, say_rows
from training.errors import OptionsError
from training.options.checks import option_problems
from training.options.intervals import steps_between_saves, typed_save_seconds
from training.options.trainer_options import TrainingOptions
from training.run import save_interval
from training.run.save_interval import SaveInterval, save_steps
from training.storage import checkpoint
from training.trainer import train


def options(**typed: Any) -> TrainingOptions:
    return TrainingOptions(local_output_dir="x", **typed)


@pytest.mark.parametrize(
    ("typed", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), ("5 min", 300), (None, None)]
)
def test_a_time_is_read_in_seconds_minutes_and_hours(typed, seconds):
    assert typed_save_seconds(options(save_every=typed)) == seconds


@pytest.mark.parametrize("typed", ["0s", "10", "-1h", "min", "10m", "1e3s"])
def test_what_is_no_time_is_refused(typed):
    with pytest.raises(OptionsError, match=f"--save-every {typed}: expected a time such as 90s, 10min or 1h"):
        typed_save_seconds(options(save_every=typed))


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "eval_steps", "steps"),
    [
        (600, 0.5, 100, 1200),
        (600, 0.53, 100, 1100),
        (600, 7.0, 100, 86),
        (3, 10.0, 100, 1),
        (600, 4.0, 100, 200),
    ],
)
def test_saves_above_the_interval_of_evaluations_bring_no_further_ones(
    seconds, step_seconds, eval_steps, steps
):
    assert steps_between_saves(seconds, step_seconds, eval_steps) == steps


def test_steps_and_time_together_and_a_clock_that_chooses_the_best_model_are_refused():
    [both] = option_problems(options(save_every="10min", save_steps=50))
    assert both == "--save-every 10min and --save-steps 50 contradict each other. Leave one out"
    [best] = option_problems(options(save_every="10min", final_model="best"))
    assert "With --final-model best type --save-steps N instead" in best


FORMER = {"options": {"save_every": "5min", "save_steps": None}, "decided": {"save_steps": 40}}
OLD = {"options": {"save_steps": 200}, "decided": {"batching": "packed"}}  # of a version without --save-every


@pytest.mark.parametrize(
    ("typed", "former", "steps"),
    [
        ({}, None, None),
        ({"save_steps": 7}, None, 7),
        ({"final_model": "best"}, None, 200),
        ({"final_model": "best", "save_steps": 9}, None, 9),
        ({"save_every": "5min"}, FORMER, 40),
        ({"save_every": "6min"}, FORMER, None),
        ({"save_steps": 7}, FORMER, 7),
        ({"save_every": "5min"}, {"options": {"save_every": "5min"}, "decided": {"save_steps": None}}, None),
        ({}, OLD, 200),
        ({"save_every": "5min"}, OLD, None),
    ],
)
def test_a_resumed_run_keeps_its_steps_between_saves_unless_others_are_typed(typed, former, steps):
    assert save_steps(options(**typed), former) == steps


@pytest.mark.parametrize(
    ("is_default", "steps"), [(False, 31), (True, 101)], ids=["typed", "a quarter of 400"]
)
def test_rank_0_decides_once_from_the_steps_after_the_first_two(monkeypatch, is_default, steps):
    clock = iter(range(10_000))
    monkeypatch.setattr(save_interval.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(save_interval, "broadcast", lambda steps: steps + 1)  # another rank's figure
    decided: list[int] = []
    interval = SaveInterval(30.0, is_default, decided.append)
    args, state = (
        SimpleNamespace(eval_steps=100, save_steps=10**9),
        SimpleNamespace(save_steps=10**9, max_steps=400),
    )
    for step in range(1, 31):
        if step <= 2:
            interval.on_step_begin(args, state, None)
            for _ in range(1000):
                next(clock)  # slow
        else:
            interval.on_step_begin(args, state, None)
        interval.on_step_end(args, state, None)
        assert (state.save_steps == 10**9) == (step < 10)
    assert decided == [steps]
    assert args.save_steps == state.save_steps == steps


@pytest.mark.slow
def test_a_run_saves_by_time_records_its_steps_and_figures_and_a_resume_keeps_them(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(save_interval, "steps_between_saves", lambda *_: 4)
    typed = {
        "input_model": "demo", "training_dataset": jsonl(tmp_path / "rows.jsonl", say_rows(60)), "test_size": 8,
        "per_device_train_batch_size": 2, "max_steps": 14, "eval_steps": 50, "logging_steps": 1, "save_every": "1h", "save_total_limit": 9,
        "local_output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    record = train(TrainingOptions(**typed))
    folders = checkpoint.checkpoints(tmp_path / "run")
    assert [checkpoint.step_of(folder) for folder in folders] == [12, 14], "none before the steps were timed"
    assert record["decided"]["save_steps"] == 4
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in figures if "loss" in entry] == list(range(1, 15)), "a save hides none"
    saves = {entry["step"]: entry for entry in figures if "blocked_seconds" in entry}
    for folder in folders:
        written = sum(file["size"] for file in checkpoint.read_manifest(folder)["files"].values())
        assert saves[checkpoint.step_of(folder)]["written_bytes"] == written
    assert record["saves"]["count"] == 2
    assert record["saves"]["written_bytes"] == sum(save["written_bytes"] for save in saves.values())
    assert record["saves"]["blocked_seconds"] == sum(save["blocked_seconds"] for save in saves.values()) > 0
    monkeypatch.setattr(save_interval, "steps_between_saves", lambda *_: pytest.fail("timed again"))
    again = train(TrainingOptions(**typed | {"max_steps": 27, "resume": "auto"}))
    steps = [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(tmp_path / "run")]
    assert steps == [12, 14, 16, 20, 24, 27]
    assert again["decided"]["save_steps"] == 4
