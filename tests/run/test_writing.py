"""A folder has one writer at a time: a second is refused, and a killed one leaves no lock."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock._unix
import pytest

from training.errors import FolderBusyError
from training.files import WRITER_FILES, WRITER_INFO
from training.run.lock import one_writer

ROOT = Path(__file__).parents[2]

HOLD = """
import os, sys, time
from pathlib import Path
from training.run.lock import one_writer
with one_writer(Path(sys.argv[1])):
    if not os.fork() if sys.argv[2:] == ["fork"] else True:
        os.write(1, f"held {os.getpid()}\\n".encode())
    time.sleep(60)
    os._exit(0)
"""


@contextmanager
def held(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """(process that holds the folder, id that it or its child prints). The process is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(folder), *more]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        word, number = other.stdout.readline().split()
        assert word == "held"
        try:
            yield other, int(number)
        finally:
            other.kill()


def test_a_second_writer_is_refused_with_what_to_do_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    with held(folder) as (other, _), pytest.raises(FolderBusyError) as refusal, one_writer(folder):
        pytest.fail("two processes hold the folder")
    message = str(refusal.value)
    assert message.startswith(f"{folder}: another run is writing into it (process {other.pid} on ")
    assert f"stop it (kill {other.pid} on " in message
    assert message.endswith("or name another --local-output-dir")

    assert other.returncode == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == set(WRITER_FILES)
    with one_writer(folder):
        assert json.loads((folder / WRITER_INFO).read_text())["pid"] == os.getpid()
    (folder / WRITER_INFO).write_text('{"pid": 1, "host": "gone", "since": "2020-01-01"}')
    with held(folder):
        pass  # another process gets it, even if a killed writer left text in the file


def test_children_of_a_killed_writer_do_not_keep_the_lock(tmp_path: Path) -> None:
    with held(tmp_path, "fork") as (other, child):  # like the workers of a data loader
        try:
            other.kill()
            other.wait()
            os.kill(child, 0)  # it is alive
            with one_writer(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_only_one_of_many_processes_gets_the_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from training.errors import FolderBusyError\n"
        "from training.run.lock import one_writer\n"
        "try:\n"
        "    with one_writer(Path(sys.argv[1])):\n"
        "        print('mine', flush=True); sys.stdin.read()\n"
        "except FolderBusyError:\n"
        "    print('busy', flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    racing = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert sorted(process.stdout.readline() for process in racing) == ["busy\n"] * 5 + ["mine\n"]
    for process in racing:
        process.communicate("")
        assert process.returncode == 0


@pytest.mark.parametrize("info", ["", "[]", "{}", "\x00"])
def test_an_unknown_writer_still_holds_the_folder(tmp_path: Path, info: str) -> None:
    with one_writer(tmp_path):
        (tmp_path / WRITER_INFO).write_text(info)
        with pytest.raises(FolderBusyError, match="unknown process"), one_writer(tmp_path):
            pytest.fail("two writers")


def test_a_writer_leaves_no_files_even_if_it_failed(tmp_path: Path) -> None:
    with one_writer(tmp_path / "out"):
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(WRITER_FILES)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ZeroDivisionError), one_writer(tmp_path / "out"):
        _ = 1 / 0
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("reason", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(getattr(errno, reason), reason)

    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), one_writer(tmp_path / "file" / "out"):
        pytest.fail("the folder cannot exist")
    assert not caplog.text
    monkeypatch.setattr(filelock._unix.fcntl, "flock", refuse)
    with one_writer(tmp_path):
        (tmp_path / "model").touch()
    assert "its file system has no locks" in caplog.text
