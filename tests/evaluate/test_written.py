"""What an evaluation leaves in the model's folder when files there are damaged or are replaced meanwhile."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from training.evaluate import __main__ as command
from training.evaluate.report import as_table, read_evaluation, write_evaluation

FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75}
METRICS = {"exact_match": {"base": FIGURE, "tuned": FIGURE, "difference": FIGURE}}
SECTION: dict[str, Any] = {
    "base": "b",
    "tuned": "t",
    "rows": {"source": "f", "count": 2, "of": 2, "chosen": "two rows", "left_out": {}},
    "settings": {"max_new_tokens": 4, "same_tokens": True},
    "metrics": METRICS,
    "categories": {},
}
TASKS: dict[str, Any] = {
    "base": "b",
    "tuned": "t",
    "settings": {"prompt": "in Dolly's prompt"},
    "notes": [],
    "tasks": {"piqa": {"metrics": {"acc": METRICS["exact_match"]}}},
}


@pytest.mark.parametrize(
    "damaged",
    [
        5,
        [],
        {"rows": {}},
        SECTION | {"metrics": []},
        SECTION | {"metrics": {"other": {}}},
        SECTION | {"metrics": {"loss": {"base": 1}}},
    ],
)
def test_a_damaged_section_is_replaced_and_said_and_the_others_are_kept(
    damaged: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"held_out": damaged, "file": SECTION, "tasks": TASKS, "unknown": 1}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert read_evaluation(tmp_path) == {"file": SECTION, "tasks": TASKS}
    assert "held_out" in caplog.text
    assert "evaluation.json" in caplog.text
    write_evaluation(tmp_path, {"tasks": TASKS})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"file": SECTION, "tasks": TASKS}
    assert (tmp_path / "README.md").read_text().count("two rows") == 1


def test_a_task_without_a_figure_has_a_table_without_lines() -> None:
    text = as_table({"tasks": TASKS | {"tasks": {"piqa": {"metrics": {}}}}})
    assert text.startswith("benchmarks of lm-eval, in Dolly's prompt:\n")
    assert "piqa" not in text


def test_an_unreadable_evaluation_is_said_before_it_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_evaluation(tmp_path) == {}
    assert not caplog.text
    (tmp_path / "evaluation.json").write_bytes(b'{"held_out": \xff')
    assert write_evaluation(tmp_path, {"file": SECTION}) == {"file": SECTION}
    assert "evaluation.json: cannot be read" in caplog.text


def test_a_card_that_is_no_text_is_left_alone_and_the_results_are_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe of another program")
    write_evaluation(tmp_path, {"file": SECTION})
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe of another program"
    assert read_evaluation(tmp_path) == {"file": SECTION}
    assert "README.md: cannot be read" in caplog.text


def test_two_evaluations_at_once_lose_nothing(tmp_path: Path) -> None:
    sections = {"held_out": SECTION, "file": SECTION, "tasks": TASKS}
    errors: list[BaseException] = []

    def write(kind: str) -> None:
        try:
            for _ in range(20):
                write_evaluation(tmp_path, {kind: sections[kind]})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(kind,)) for kind in sections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert read_evaluation(tmp_path) == sections
    text = (tmp_path / "README.md").read_text()
    assert text.count("<!-- evaluation -->") == 1
    assert "piqa" in text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"status": "finished", "id": "1", "weights": {"a": 1}, "options": {"input_model": "demo"}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("change", ["trained again", "removed"])
def test_results_of_a_model_that_was_replaced_meanwhile_are_not_written_beside_the_new_one(
    change: str, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compare(*_: object, **__: object) -> dict[str, Any]:
        if change == "removed":
            shutil.rmtree(run)
        else:
            record = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps(record | {"weights": {"a": 2}}))
        return {"file": SECTION}

    monkeypatch.setattr(command, "_compare", compare)
    result = CliRunner().invoke(command.main, ["--model", str(run), "--rows", "rows.jsonl"])
    assert result.exit_code == 0, result.output
    assert "two rows" in result.output
    assert "has changed" in caplog.text
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("options", "logs"),
    [
        ({"report_to": "tensorboard, mlflow"}, True),
        ({"report_to": "tensorboard", "mlflow_model_name": "dolly"}, True),
        ({"mlflow": True}, True),  # of an older run
        ({"report_to": "tensorboard,wandb", "mlflow_model_name": None}, False),
        ({}, False),
    ],
)
def test_results_go_to_mlflow_if_the_run_logs_there(
    options: dict[str, Any], logs: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"options": {"input_model": "demo"} | options}))
    logged: list[object] = []
    monkeypatch.setattr(command, "_compare", lambda *_, **__: {"file": SECTION})
    monkeypatch.setattr(command, "log_evaluation", lambda *arguments: logged.append(arguments[2]))
    result = CliRunner().invoke(command.main, ["--model", str(run), "--rows", "rows.jsonl"])
    assert result.exit_code == 0, result.output
    assert logged == [{"file": SECTION}] * logs


def test_a_file_that_cannot_be_read_is_not_called_results_that_cannot_be_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied", "cache/rows.arrow")

    words = ["--model", str(run), "--rows", "rows.jsonl"]
    monkeypatch.setattr(command, "_compare", fail)
    result = CliRunner().invoke(command.main, words)
    assert result.exit_code == 2
    assert "Cannot evaluate: [Errno 13] Permission denied: 'cache/rows.arrow'\n" in result.output
    monkeypatch.setattr(command, "_compare", lambda *_, **__: {"file": SECTION})
    monkeypatch.setattr(command, "write_evaluation", fail)
    result = CliRunner().invoke(command.main, words)
    assert result.exit_code == 2
    assert "Cannot evaluate: the results could not be written ([Errno 13]" in result.output
    assert "two rows" in result.output, "they are printed all the same"


def test_results_are_written_although_nobody_reads_the_table_any_more(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(command, "_compare", lambda *_, **__: {"file": SECTION})
    monkeypatch.setattr(command, "print", closed, raising=False)
    CliRunner().invoke(command.main, ["--model", str(run), "--rows", "rows.jsonl"])
    assert read_evaluation(run) == {"file": SECTION}


def test_output_may_not_replace_a_file_of_the_model(run: Path) -> None:
    result = CliRunner().invoke(
        command.main, ["--model", str(run), "--rows", "rows.jsonl", "--output", str(run / "run.json")]
    )
    assert result.exit_code == 2
    assert "--output" in result.output
    assert "lies in the model's folder" in result.output
