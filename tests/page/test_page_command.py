"""The command of the page: every problem in one message, before gradio is imported or a model is loaded."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from training.page import __main__ as command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"status": "finished", "id": "1", "options": {"input_model": "demo"}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[command.Options]:
    """The options with which the page would have been opened."""
    opened: list[command.Options] = []
    monkeypatch.setattr(command, "_serve", opened.append)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(command.PASSWORD_VARIABLE, raising=False)
    return opened


def problems(*words: object, **environment: str) -> list[str]:
    result = CliRunner().invoke(command.main, list(map(str, words)), env=environment)
    assert result.exit_code in (0, 2), result.output
    return result.output.partition("Error: ")[2].splitlines()


def test_all_problems_are_reported_together_and_nothing_is_loaded(
    run: Path, tmp_path: Path, served: list[command.Options]
) -> None:
    gradio = "gradio" in sys.modules
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        reported = problems("--model", run, "--model", tmp_path / "none", "--base", run, "--no-base", "--prot", "1", "--rows",
                            tmp_path / "rows.csv", "--votes", run / "votes.jsonl", "--port", port)  # fmt: skip
    text = "\n".join(reported)
    for part in (
        "No such option '--prot'. Did you mean --port",
        f"{tmp_path / 'none'}: no such folder",
        "contradicts --no-base",
        "is named twice",
        "no such file",
        "the folder of a model, which is published",
        f"--port {port}: cannot be opened on 127.0.0.1 (another program uses it",
    ):
        assert part in text, (part, text)
    assert not served
    assert ("gradio" in sys.modules) == gradio


def test_the_base_is_the_model_from_which_the_run_started(
    run: Path, tmp_path: Path, free_port: int, served: list[command.Options]
) -> None:
    port = ["--port", free_port]
    assert not problems("--model", run, *port)
    assert not problems("--model", run, "--no-base", *port)
    assert not problems("--model", run, "--base", "gpt2", *port)
    assert [options.chosen_base for options in served] == ["demo", None, "gpt2"]
    (run / "run.json").write_text(
        json.dumps({"status": "finished", "options": {"input_model": "/gone/base"}})
    )
    [problem] = problems("--model", run, *port)
    assert problem.startswith("--base is missing, and /gone/base, from which the run started, cannot be used")
    (run / "run.json").write_text(json.dumps({"status": "running", "options": {"input_model": "demo"}}))
    [problem] = problems("--model", run, *port)
    assert "its training did not finish" in problem
    [problem] = problems(*port)
    assert problem == "--model is missing. Name the output folder of a run"


def test_another_host_needs_a_password_which_may_come_from_the_environment(
    run: Path, free_port: int, served: list[command.Options]
) -> None:
    words = ["--model", run, "--port", free_port]
    for host in ("0.0.0.0", "::"):
        assert "everybody who reaches this machine could use the page" in problems(*words, "--host", host)[0]
    assert "--password is empty" in problems(*words, "--host", "0.0.0.0", "--password", " ")[0]
    assert "is no address" in problems(*words, "--host", "no.such.host.invalid", "--password", "x")[0]
    for host in ("127.0.0.1", "localhost"):
        assert not problems(*words, "--host", host)
    assert not problems(*words, "--host", "0.0.0.0", **{command.PASSWORD_VARIABLE: "secret"})
    assert served[-1].password == "secret"


def test_votes_go_to_the_home_folder_and_not_where_they_cannot_be_written(
    run: Path, tmp_path: Path, free_port: int, served: list[command.Options]
) -> None:
    words = ["--model", run, "--port", free_port]
    assert not problems(*words)
    assert served[0].votes == str(tmp_path / "dolly_training" / "votes.jsonl")
    assert "cannot be written" in problems(*words, "--votes", "/proc/votes.jsonl")[0]
    assert "--votes is empty" in problems(*words, "--votes", "")[0]
    (tmp_path / "notes.txt").write_text("my notes\n")
    assert "line 1 is no vote of this page" in problems(*words, "--votes", tmp_path / "notes.txt")[0]


def test_a_missing_gradio_is_named_with_its_extra(
    run: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "gradio" else find(name))
    [problem] = problems("--model", run, "--port", free_port)
    assert problem.startswith("gradio is not installed. Type ")
