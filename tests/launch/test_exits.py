"""Exit codes have a meaning in words, and out-of-memory kills are counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from training.launch.exits import INTERRUPTED, REFUSED, exit_meaning, oom_kills


@pytest.mark.parametrize(
    ("codes", "words"),  # of a signal: from Python, a shell, DeepSpeed's launcher
    [
        ([0], "finished"),
        ([1, 3, 255, -33], "failed: see the error"),  # 255: sys.exit(-1) or ssh; -33: no such signal
        ([2], "refused before training"),
        ([75], "stopped by SIGTERM or Ctrl-C, with a checkpoint. Continue with --resume auto"),
        ([127], "a program could not be started"),
        ([-9, 137, 247], "killed, most likely because host memory ran out"),
        ([-11, 139, 245], "segmentation fault"),
        ([-6, 134], "NCCL or gloo"),
        ([-7, 135], "--shm-size"),
        ([-15, 143], "terminated (SIGTERM)"),
        ([-2, 130], "interrupted by Ctrl-C before it could save"),
        ([-1], "terminal or connection was closed"),
        ([-4], "compiled for another CPU"),
        ([-10], "ended by the signal SIGUSR1"),
    ],
)
def test_an_exit_code_has_a_meaning(codes: list[int], words: str) -> None:
    assert [code for code in codes if words not in exit_meaning(code)] == []


def test_a_kill_is_explained_by_the_memory_evidence() -> None:
    meaning = exit_meaning(-9, out_of_memory=True)
    assert meaning.startswith("killed by the system because host memory ran out")
    assert "no lack of memory" in exit_meaning(-9, out_of_memory=False)


def test_a_kill_has_the_same_meaning_from_python_a_shell_and_the_launcher() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGKILL)
    direct = process.wait()
    process.stdin.close()
    shell = subprocess.run(["bash", "-c", "(kill -9 $BASHPID); exit $?"]).returncode
    launcher = subprocess.run([sys.executable, "-c", f"import sys; sys.exit({direct})"]).returncode
    assert (direct, shell, launcher) == (-9, 137, 247)
    assert exit_meaning(direct) == exit_meaning(shell) == exit_meaning(launcher)


def test_our_exit_codes_match_sysexits_and_click() -> None:
    assert os.EX_TEMPFAIL == INTERRUPTED
    assert click.UsageError.exit_code == REFUSED


@pytest.mark.parametrize(
    ("files", "count"),
    [
        (  # version 2
            {
                "proc/self/cgroup": "0::/user.slice/run\n",
                "sys/fs/cgroup/user.slice/run/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
                "proc/vmstat": "oom_kill 9\n",
            },
            2,
        ),
        (  # version 1
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job/7\n0::/\n",
                "sys/fs/cgroup/memory/job/7/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            },
            1,
        ),
        ({"proc/self/cgroup": "0::/gone\n", "proc/vmstat": "nr_free_pages 7\noom_kill 4\n"}, 4),
        ({"proc/self/cgroup": "0::/gone\n"}, None),
        ({}, None),  # a Mac
    ],
)
def test_out_of_memory_kills_are_counted_if_the_system_reports_them(
    tmp_path: Path, files: dict[str, str], count: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == count


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        ("print('done', end='')", 0, "done"),
        ("sys.exit(75)", 75, ""),
        ("sys.stdout = None; sys.exit(75)", 75, ""),  # without an output
        ("sys.exit()", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("sys.exit('no such thing')", 1, "no such thing"),
    ],
)
def test_a_command_keeps_its_exit_code_and_output_without_pythons_shutdown(
    command: str, code: int, expected: str
) -> None:
    words = (
        "import atexit, os, sys\nfrom training.launch.exits import run_and_exit\natexit.register(os.abort)\n"
        f"def command(): {command}\nrun_and_exit(command)"
    )
    command_line = [sys.executable, "-c", words]
    result = subprocess.run(command_line, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == code
    assert expected in result.stdout + result.stderr
    assert bool(result.stderr) == (code == 1)


@pytest.mark.parametrize("end", ["sys.exit(75)", "1 / 0"])
def test_a_failed_command_exits_before_its_objects_are_destroyed(end: str) -> None:
    """The destructors of a model or a process group may wait for the device or for other ranks."""
    words = f"""
import sys
from training.launch.exits import run_and_exit
class Model:
    def __del__(self): print("destroyed", flush=True)
def command():
    model = Model()
    {end}
run_and_exit(command)
"""
    result = subprocess.run(
        [sys.executable, "-c", words], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert result.returncode == (75 if "75" in end else 1)
    assert result.stdout == ""
