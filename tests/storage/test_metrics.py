"""metrics.jsonl: whole lines, plain JSON, no step twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from training.storage import metrics
from training.tracking.callbacks import MetricsLog

A = {"step": 1, "loss": 2.5, "response": "Grüße\u2028aus\nKöln"}
B = {"step": 2, "loss": 2.0}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert metrics.read(file) == []
    assert metrics.append(file, A)
    assert metrics.append(file, B, B)
    assert metrics.read(file) == [A, B, B]
    assert file.read_bytes().count(b"\n") == 3
    assert "Grüße" in file.read_text(), "people read it as well"


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_line_takes_no_other_with_it(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, B, A)
    file.write_bytes(file.read_bytes()[:-cut])  # in the middle of a character as well
    assert metrics.read(file) in ([B], [B, A])
    metrics.append(file, A)
    assert metrics.read(file)[-1] == A
    assert metrics.read(file)[0] == B


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    metrics.append(tmp_path / "a", {"step": 1, "grad_norm": float("inf"), "loss": float("nan")})
    strict = json.loads((tmp_path / "a").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "grad_norm": None, "loss": None}


def test_what_is_no_entry_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('[]\n7\n{}\n{"step": "x"}\n\n{"step": 3}\n')
    assert metrics.read(tmp_path / "a") == [{"step": 3}]


def test_steps_after_the_one_to_go_on_from_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.forget_after(file, 1)
    assert not file.exists()
    metrics.append(file, A, B)
    before = file.stat().st_ino
    metrics.forget_after(file, 2)
    assert file.stat().st_ino == before, "nothing to forget, nothing written"
    metrics.forget_after(file, 1)
    assert metrics.read(file) == [A]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.forget_after(tmp_path / "new", 1, file)
    assert (tmp_path / "new").read_bytes() == file.read_bytes()


def test_training_figures_and_held_out_losses_are_entries_each_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for begin in (0.0, 100.0):  # the second: a run that goes on, and measures the held-out loss again
        log = MetricsLog(file, lambda begin=begin: begin + 7.0)
        state = TrainerState(global_step=10, max_steps=40, epoch=0.25)
        log.on_train_begin(None, state, TrainerControl())
        for logs in (
            {"loss": 1.5, "learning_rate": 1e-5, "mfu": 0.4, "epoch": 0.25},
            {"eval_loss": 1.25, "eval_runtime": 3.0, "epoch": 0.25},
            {"train_runtime": 9.0, "train_loss": 1.5},
        ):
            log.on_log(None, state, TrainerControl(), logs=logs)
    place = {"step": 10, "max_steps": 40, "epoch": 0.25, "seconds": 7.0}
    assert metrics.read(file) == [
        place | {"loss": 1.5, "learning_rate": 1e-5, "mfu": 0.4},
        place | {"eval_loss": 1.25},
    ]
