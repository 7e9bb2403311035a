"""Launching the trainer from notebook and flow: the command, live output, and the error if it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training.errors import TrainingFailedError
from training.launch.local import deepspeed_command, shell_command
from training.launch.restart import launch
from training.options.command_line import option_words
from training.options.trainer_options import TrainingOptions
from training.trainer import main


def test_options_survive_the_conversion_to_command_line_words() -> None:
    chosen = {"lr": 0.00012345678, "epochs": 1.0, "bf16": False, "keep_truncated": True, "force": False}
    chosen |= {"max_steps": None, "training_dataset": ("my rows.jsonl", "a,b/c"), "local_output_dir": "out"}
    context = main.make_context("training.trainer", option_words(chosen))
    options = TrainingOptions(**context.params)
    expected = {name: value for name, value in chosen.items() if value is not None}
    assert {name: getattr(options, name) for name in expected} == expected


def test_an_unknown_option_raises_a_key_error() -> None:
    with pytest.raises(KeyError, match="learning_rate"):
        option_words({"learning_rate": 1e-5})


def test_the_displayed_command_is_one_that_a_person_would_type() -> None:
    command = deepspeed_command({"epochs": 1.0, "training_dataset": "my rows.jsonl"}, 8)
    assert command[0] == sys.executable, (
        "the first line of a script cannot name a Python in a folder with a space"
    )
    assert shell_command(command) == (
        "deepspeed --num_gpus 8 --module training.trainer --epochs 1 --training-dataset 'my rows.jsonl'"
    )


def test_a_missing_deepspeed_raises_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -r requirements\.txt"):
        deepspeed_command({}, 1)


def test_output_is_shown_line_by_line_while_the_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    waits = "import time; print('first'); time.sleep(1); print('second')"
    thread = threading.Thread(target=lambda: (time.sleep(0.6), seen.append(capsys.readouterr().out)))
    thread.start()
    launch([sys.executable, "-c", waits])
    thread.join()
    assert seen[0] + capsys.readouterr().out == "first\nsecond\n"


@pytest.mark.parametrize(
    ("command", "code", "meaning", "end"),
    [
        ("print('rank 1: no file', file=sys.stderr); sys.exit(2)", 2, "2: refused before training", "rank 1: no file"),
        ("os.kill(os.getpid(), 9)", -9, "-9: killed", ""),
    ],
)  # fmt: skip
def test_a_failure_raises_with_exit_code_meaning_and_last_lines(
    command: str, code: int, meaning: str, end: str
) -> None:
    with pytest.raises(TrainingFailedError, match=f"exit code {meaning}") as failure:
        launch([sys.executable, "-c", f"import os, sys; {command}"])
    assert failure.value.code == code
    assert str(failure.value).endswith(end)


def test_cpu_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"]
    launch(show)
    launch(show, cpu_ranks=2)
    launch(show, cpu_ranks=10_000)
    assert capsys.readouterr().out.split() == ["None", str(max(1, (os.cpu_count() or 2) // 2)), "1"]


def driver_of(code: str) -> subprocess.Popen[str]:
    """A process that launches Python code, as a notebook's kernel launches training."""
    driver = (
        f"import sys; from training.launch.restart import launch; launch([sys.executable, '-c', {code!r}])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", driver],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" sets it to SIG_IGN
    )


def test_an_interrupt_lets_the_run_save_and_reports_its_exit_code() -> None:
    saves = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('saved'), sys.exit(75)))\n"
        "print('training'); time.sleep(60)"
    )
    with driver_of(saves) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    assert output == "saved\n"
    assert "exit code 75: interrupted" in error


def test_a_second_interrupt_kills_a_run_that_does_not_stop() -> None:
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(300)"
    with driver_of(hangs) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_killed_driver_leaves_no_process_running() -> None:
    saves = (
        "import os, signal, sys, time; print(os.getpid(), flush=True); "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(300)"
    )
    with driver_of(saves) as process:
        run = Path("/proc", process.stdout.readline().strip())
        assert run.exists()
        process.kill()
    deadline = time.monotonic() + 30
    while run.exists() and "(zombie)" not in (run / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
