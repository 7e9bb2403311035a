"""metrics.jsonl: complete lines, strict JSON, no step twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from training.storage import metrics
from training.tracking.callbacks import MetricsLog

A = {"step": 1, "loss": 2.5, "response": "Grüße\u2028aus\nKöln"}
B = {"step": 2, "loss": 2.0}


def test_entries_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert metrics.read(file) == []
    assert metrics.append(file, A)
    assert metrics.append(file, B, B)
    assert metrics.read(file) == [A, B, B]
    assert file.read_bytes().count(b"\n") == 3
    assert "Grüße" in file.read_text(), "readable for people"


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_an_incomplete_last_line_does_not_damage_other_lines(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, B, A)
    file.write_bytes(file.read_bytes()[:-cut])  # also in the middle of a character
    assert metrics.read(file) in ([B], [B, A])
    metrics.append(file, A)
    assert metrics.read(file)[-1] == A
    assert metrics.read(file)[0] == B


def test_nan_and_infinity_are_written_as_null(tmp_path: Path) -> None:
    metrics.append(tmp_path / "a", {"step": 1, "grad_norm": float("inf"), "loss": float("nan")})
    strict = json.loads((tmp_path / "a").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "grad_norm": None, "loss": None}


def test_lines_that_are_no_entries_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('[]\n7\n{}\n{"step": "x"}\n\n{"step": 3}\n')
    assert metrics.read(tmp_path / "a") == [{"step": 3}]


def test_entries_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.drop_entries_after(file, 1)
    assert not file.exists()
    metrics.append(file, A, B)
    before = file.stat().st_ino
    metrics.drop_entries_after(file, 2)
    assert file.stat().st_ino == before, "nothing to drop, nothing written"
    metrics.drop_entries_after(file, 1)
    assert metrics.read(file) == [A]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.drop_entries_after(tmp_path / "new", 1, file)
    assert (tmp_path / "new").read_bytes() == file.read_bytes()


def test_training_metrics_and_held_out_losses_are_logged_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for start in (0.0, 100.0):  # the second is a resumed run that evaluates the held-out rows again
        log = MetricsLog(file, lambda start=start: start + 7.0)
        state = TrainerState(global_step=10, max_steps=40, epoch=0.25)
        log.on_train_begin(None, state, TrainerControl())
        for logs in (
            {"loss": 1.5, "learning_rate": 1e-5, "mfu": 0.4, "epoch": 0.25},
            {"eval_loss": 1.25, "eval_runtime": 3.0, "epoch": 0.25},
            {"train_runtime": 9.0, "train_loss": 1.5},
        ):
            log.on_log(None, state, TrainerControl(), logs=logs)
    common = {"step": 10, "max_steps": 40, "epoch": 0.25, "seconds": 7.0}
    assert metrics.read(file) == [
        common | {"loss": 1.5, "learning_rate": 1e-5, "mfu": 0.4},
        common | {"eval_loss": 1.25},
    ]
