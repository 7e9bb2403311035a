"""Runs with several sources: held-out losses of each in every file, rows named by source, and resumes bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import jsonl, say_rows
from tests.run.test_kills import Run, assert_the_same_run, record
from training.errors import OptionsError, TrainingError
from training.options.trainer_options import TrainingOptions
from training.run.step_guard import StepGuard
from training.storage import metrics
from training.tracking.tracker import Entry, panel_names
from training.trainer import train

LABELS = ("plain", "chats")


def conversations(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns."""
    turns = [(f"Count {n}.", "one two three"[: 3 + n % 9]) for n in range(3 * count)]
    return [
        {
            "messages": [
                {"role": role, "content": text}
                for turn in turns[3 * n : 3 * n + 1 + n % 3]
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A file of plain rows and one of conversations."""
    folder = tmp_path_factory.mktemp("sources")
    return jsonl(folder / "plain.jsonl", say_rows(60)), jsonl(folder / "chats.jsonl", conversations(30))


def options_of(base: Path, sources: tuple[str, ...], output: Path, **changed: Any) -> TrainingOptions:
    options: dict[str, Any] = {
        "local_output_dir": str(output), "input_model": str(base), "training_dataset": sources, "test_size": 12,
        "max_steps": 4, "eval_steps": 2, "logging_steps": 1, "save_steps": 2, "lr": 1e-3, "bf16": False,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3,
    }  # fmt: skip
    return TrainingOptions(**options | changed)


@pytest.fixture(scope="module")
def finished(base_folder: Path, sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    train(options_of(base_folder, sources, output))
    return output


def test_each_sources_held_out_loss_is_in_every_file(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert [source["label"] for source in run["sources"]] == list(LABELS)
    assert [source["held_out"] for source in run["sources"]] == [8, 4]
    assert [source["rows"] for source in run["sources"]] == [60, 30]
    evaluations = [e for e in metrics.read(finished / "metrics.jsonl") if "eval_loss" in e]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    for entry in evaluations:
        losses = metrics.losses_by_source(entry)
        assert tuple(losses) == LABELS
        assert min(losses.values()) < entry["eval_loss"] < max(losses.values()), "the mean over all tokens"
    assert run["held_out_loss"] == {
        "before": evaluations[0]["eval_loss"],
        "after": evaluations[2]["eval_loss"],
        "by_source": {
            label: {
                "before": evaluations[0][f"eval_loss_{label}"],
                "after": evaluations[2][f"eval_loss_{label}"],
            }
            for label in LABELS
        },
    }
    assert list(run["held_out_loss"]["by_source"]) == list(LABELS), "in the order typed"
    state = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    assert [e["eval_loss_chats"] for e in state if "eval_loss" in e] == [
        e["eval_loss_chats"] for e in evaluations
    ]
    drawn = EventAccumulator(str(finished / "runs")).Reload()
    for name, tag in (
        ("eval_loss", "eval/loss"),
        *((f"eval_loss_{label}", f"eval/loss_{label}") for label in LABELS),
    ):
        assert [event.value for event in drawn.Scalars(tag)] == pytest.approx([e[name] for e in evaluations])
    sent = panel_names(Entry(4, evaluations[2], 0).figures())
    assert sent["eval/loss_chats"] == evaluations[2]["eval_loss_chats"], "the name in W&B and Trackio"
    card = (finished / "README.md").read_text()
    assert "It answers a question, also one that follows earlier turns" in card
    for source in run["sources"]:
        of_source = run["held_out_loss"]["by_source"][source["label"]]
        figures = (
            f"{source['rows']} | {source['held_out']} | {of_source['before']:.4f} | {of_source['after']:.4f}"
        )
        assert f"| `{source['source']}` | {figures} |" in card
    ledger = json.loads((finished / "ledger.json").read_text())
    assert ledger["rows_read"] == 90
    assert [source["rows_read"] for source in ledger["sources"]] == [60, 30]


def test_a_sources_held_out_loss_is_that_of_its_rows_alone(
    base_folder: Path, sources: tuple[str, str], tmp_path: Path, finished: Path
) -> None:
    """Alone a source holds out the same rows, if as many are typed."""
    [both] = [e for e in metrics.read(finished / "metrics.jsonl") if e["step"] == 0]
    for source, label, test_size in zip(sources, LABELS, (8, 4), strict=True):
        output = tmp_path / label
        train(options_of(base_folder, (source,), output, test_size=test_size, max_steps=1))
        [alone] = [e for e in metrics.read(output / "metrics.jsonl") if e["step"] == 0]
        assert not metrics.losses_by_source(alone)
        assert alone["eval_loss"] == pytest.approx(both[f"eval_loss_{label}"], rel=1e-6)


def test_the_console_shows_each_sources_rows_and_loss(
    base_folder: Path, sources: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    train(options_of(base_folder, sources, tmp_path / "out", max_steps=1))
    line = r"step 0/1  held-out loss \d\.\d{4}  plain \d\.\d{4}, chats \d\.\d{4}\n"
    assert re.search(line, capsys.readouterr().out)
    for words in (
        "12 of 90 rows are held out",
        f"  8 of {sources[0]}",
        f"  4 of {sources[1]}",
        "2 sources: 90 rows read",
        *(f"a row of {source} as the model sees it; the loss is on" for source in sources),
    ):
        assert words in caplog.text
    assert re.findall(r"  of (\w+): \d\.\d{4} before, \d\.\d{4} after", caplog.text) == list(LABELS)


def test_a_bad_loss_names_the_source_of_its_rows(
    base_folder: Path, sources: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = StepGuard.note_loss
    monkeypatch.setattr(StepGuard, "note_loss", lambda self, loss: note(self, loss * float("nan")))
    with pytest.raises(TrainingError) as error:
        train(options_of(base_folder, sources, tmp_path / "out", per_device_train_batch_size=16))
    named = re.search(r"It was computing (.*)\. Look at them", str(error.value))
    assert named is not None
    assert re.fullmatch(rf"rows [\d, ]+ of {sources[0]} and rows? [\d, ]+ of {sources[1]}", named[1])


def test_other_sources_or_another_order_are_refused_at_a_resume(
    base_folder: Path, sources: tuple[str, str], finished: Path
) -> None:
    with pytest.raises(OptionsError) as error:
        train(options_of(base_folder, sources[::-1], finished, resume="auto", max_steps=6))
    order = f"the sources of --training-dataset were in this order: {sources[0]}, {sources[1]}\n"
    assert order in str(error.value)
    with pytest.raises(OptionsError, match=r"the rows differ: another --training-dataset .*\(it was "):
        train(options_of(base_folder, sources[:1], finished, resume="auto", max_steps=6))


def test_a_source_that_a_forced_resume_adds_has_no_loss_from_before(
    base_folder: Path, sources: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options_of(base_folder, sources[:1], tmp_path / "out", max_steps=2))
    train(options_of(base_folder, sources, tmp_path / "out", resume="auto", force=True))
    by_source = json.loads((tmp_path / "out" / "run.json").read_text())["held_out_loss"]["by_source"]
    assert list(by_source) == list(LABELS)
    assert all(loss["before"] is None and loss["after"] > 0 for loss in by_source.values())
    assert (tmp_path / "out" / "README.md").read_text().count("not measured") == 2
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_resumed_in_mid_epoch_end_with_the_same_weights_and_log(
    sources: tuple[str, str], tmp_path: Path
) -> None:
    """Stopped by SIGTERM at a step that neither logs nor measures, in the second epoch."""
    # 78 rows to train on: 10 steps an epoch.
    more = ["--training-dataset", sources[1], "--test-size", "12", "--max-steps", "26"]
    undisturbed = Run(sources[0], tmp_path / "undisturbed", 2, *more)
    undisturbed.wait_for_exit()
    run = Run(sources[0], tmp_path / "stopped", 2, *more)
    assert run.wait_until(lambda: run.has_logged(12))
    os.kill(run.pids("rank")[-1], signal.SIGTERM)
    run.wait()
    assert record(run.folder)["status"] == "stopped"
    Run(sources[0], run.folder, 2, *more, "--resume", "auto").wait_for_exit()
    assert_the_same_run(run.folder, undisturbed.folder)
    history = [
        [
            metrics.losses_by_source(entry)
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
        ]
        for folder in (run.folder, undisturbed.folder)
    ]
    assert history[0] == history[1]
    assert any(history[0])
