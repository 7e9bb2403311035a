"""A run that is started again: after which ends, how often, from where, and when it is given up."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import jsonl, say_rows
from training.consts import ROOT
from training.errors import TrainingFailedError
from training.launch import __main__ as command
from training.launch import restart
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, LOST_PEER, REFUSED, restart_cures
from training.launch.restart import MOST_WITHOUT_PROGRESS, launch, stopped_processes
from training.storage.checkpoint import write_manifest
from training.storage.record import write_run_record

# A stand-in for the trainer: its n-th start writes its arguments, and does the n-th of the given deeds.
STAND_IN = """
import os, signal, sys
from pathlib import Path
from training.storage.checkpoint import write_manifest
from training.storage.record import write_run_record

output, deeds = Path(sys.argv[2]), sys.argv[5].split()
starts = output.with_name("starts")
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    print(*sys.argv[6:], file=file)
for deed in deeds[min(number, len(deeds) - 1)].split(","):
    if deed.startswith("save"):
        folder = output / f"checkpoint-{deed[4:]}"
        folder.mkdir(parents=True)
        write_manifest(folder, None, [], {})
    elif deed == "finish":
        output.mkdir(exist_ok=True)
        write_run_record(output, {"options": {}, "status": "finished"})
    elif deed.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, deed))
    else:
        sys.exit(int(deed))
"""


class Trainer:
    """The stand-in's command, the starts that it saw, and the pauses between them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output, self.pauses = folder / "out", []
        monkeypatch.setattr(restart.time, "sleep", self.pauses.append)

    def run(self, deeds: str, *words: str, restarts: int = 9, rank_timeout: int = 60) -> None:
        command = [sys.executable, "-c", STAND_IN, "--local-output-dir", str(self.output)]
        command += ["--rank-timeout", str(rank_timeout), deeds, *words]
        launch(command, restarts=restarts)

    @property
    def starts(self) -> list[str]:
        return self.output.with_name("starts").read_text().splitlines()


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(tmp_path, monkeypatch)


def test_a_killed_run_is_started_again_with_resume_auto_and_says_why_in_one_line(trainer, capsys):
    trainer.run("save20,SIGKILL save40,76 finish", "--lr", "1e-5")
    assert trainer.starts == ["--lr 1e-5", *["--lr 1e-5 --resume auto"] * 2]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Restart")]
    assert lines[0].startswith("Restart 1 of 9 in 1 s, from checkpoint-20: exit code -9, killed")
    assert lines[1].startswith(
        "Restart 2 of 9 in 1 s, from checkpoint-40: exit code 76, another rank ended or hangs"
    )
    assert len(lines) == 2


@pytest.mark.parametrize(
    "code", [REFUSED, CANNOT_CONTINUE, 126, 127, 128 + signal.SIGILL, 256 - signal.SIGBUS]
)
def test_an_end_that_no_restart_cures_ends_the_run(trainer, code):
    with pytest.raises(TrainingFailedError) as error:
        trainer.run(f"save20,{code} finish")
    assert error.value.code == code
    assert len(trainer.starts) == 1


@pytest.mark.parametrize("code", [1, INTERRUPTED, LOST_PEER, -9, 137, 247, 143, 134, 139, 129])
def test_ends_that_a_restart_can_cure(code):
    assert restart_cures(code)


def test_pauses_grow_until_a_new_checkpoint_and_a_run_without_progress_is_given_up(trainer):
    with pytest.raises(TrainingFailedError) as error:
        trainer.run("1 1 save20,1 1", restarts=100)
    assert trainer.pauses == [2, 4, 1, 2, 4, 8, 16]
    assert len(trainer.starts) == 3 + MOST_WITHOUT_PROGRESS
    assert f"{MOST_WITHOUT_PROGRESS} starts in a row brought no new checkpoint" in str(error.value)


def test_relative_paths_are_those_of_the_folder_in_which_the_command_is_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["--local-output-dir=elsewhere", "--local-output-dir", "out"]
    script = STAND_IN.replace("sys.argv[2]", "sys.argv[3]").replace("sys.argv[5]", "sys.argv[4]")
    launch([sys.executable, "-c", script, *words, "save20,finish"], restarts=1, folder=tmp_path)
    assert (tmp_path / "out" / "run.json").is_file()
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_a_run_is_started_again_as_often_as_allowed(trainer):
    with pytest.raises(TrainingFailedError) as error:
        trainer.run("save1,76 save2,76 save3,76 finish", restarts=2)
    assert len(trainer.starts) == 3
    assert "as often as --restarts allows" in str(error.value)


def test_host_memory_may_run_out_once(trainer, monkeypatch):
    counts = iter(range(100))  # the kernel kills in every start
    monkeypatch.setattr("training.launch.local.oom_kills", lambda: next(counts))
    with pytest.raises(TrainingFailedError) as error:
        trainer.run("save1,SIGKILL save2,1 save3,SIGKILL finish")
    assert len(trainer.starts) == 3
    assert "\nIt is not started again: host memory ran out twice\n" in str(error.value)


def test_a_launcher_that_ends_with_0_before_the_run_has_finished_is_started_again(trainer):
    """DeepSpeed's runner does, if a signal ends its launch.py."""
    write_manifest_folder(trainer.output / "checkpoint-20")
    write_run_record(trainer.output, {"options": {}, "status": "running"})
    trainer.run("0 finish")
    assert len(trainer.starts) == 2


def write_manifest_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_manifest(folder, None, [], {})


def test_an_interrupt_ends_the_run(trainer, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restart.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.run("save1,76 finish")
    assert len(trainer.starts) == 1


def test_a_signal_in_the_pause_before_a_start_ends_the_command_as_one_in_the_run_does(monkeypatch):
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "launch", interrupt)
    result = CliRunner().invoke(command.main, ["--num-gpus", "1", "--", "--local-output-dir", "/x"])
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "Stopped. To continue, type the same command with --resume auto\n"


def test_the_checkpoint_of_another_run_stays_named_until_the_new_run_has_recorded_it(trainer):
    with pytest.raises(TrainingFailedError):
        trainer.run("1", "--resume", "/other/checkpoint-20", "--master_port", "7", restarts=1)
    first, second = trainer.starts
    assert second.startswith("--resume /other/checkpoint-20 --master_port")
    assert second != first, "another port"
    write_run_record(trainer.output.parent, {"options": {}, "status": "running"})
    trainer.output.mkdir()
    write_run_record(trainer.output, {"options": {}, "status": "running"})
    with pytest.raises(TrainingFailedError):
        trainer.run("1", "--resume=/other/checkpoint-20", restarts=1)
    assert trainer.starts[-1].endswith("--resume auto")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_stopped_process_is_taken_for_hanging_and_the_run_goes_on(trainer, monkeypatch, capsys):
    monkeypatch.setattr(restart, "GRACE", 0)
    monkeypatch.setattr(restart, "_LOOK_EVERY", 0.05)
    begin = time.monotonic()
    trainer.run("save1,SIGSTOP finish", rank_timeout=1)
    assert time.monotonic() - begin < 30
    assert "has been stopped for 1 s: the run is killed" in capsys.readouterr().out
    assert len(trainer.starts) == 2
    assert stopped_processes(session=1) == []


# --- with the trainer itself --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a wrong option", "bad data", "NaN", "a full disk"])
def test_the_trainers_own_ends_that_no_restart_cures(tmp_path, monkeypatch, capfd, case, request):
    output, restarted = tmp_path / "out", []
    monkeypatch.setattr(restart.time, "sleep", restarted.append)
    rows = jsonl(tmp_path / "rows.jsonl", [{"no": "row"}] if case == "bad data" else say_rows(60))
    words = ["--input-model", "demo", "--training-dataset", rows, "--max-steps", "4", "--save-steps", "2"]
    words += ["--local-output-dir", str(output)]
    if case == "a wrong option":
        words += ["--sample-every", "never"]
    if case == "NaN":
        words += ["--lr", "1e30", "--logging-steps", "1"]
    if case == "a full disk":
        monkeypatch.setenv("LD_PRELOAD", request.getfixturevalue("failing_disk"))
        monkeypatch.setenv("FULL_DISK", f"1000:{output}/checkpoint-2")
    with pytest.raises(TrainingFailedError) as error:
        launch([sys.executable, "-m", "training.trainer", *words], restarts=3)
    text = capfd.readouterr().out
    assert error.value.code == (REFUSED if case in ("a wrong option", "bad data") else CANNOT_CONTINUE), text
    assert not restarted, text
