"""A published model is complete, byte for byte, or recognisably incomplete, also on full disks and after kills."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import termios
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import mounted, python
from tests.storage.conftest import PUBLISHED, RUN, assert_complete, content, publish_command
from training import files
from training.errors import PublishError
from training.storage import copy as copy_module
from training.storage.copy import marker_of, publish, target_problems


@pytest.fixture
def command(failing_disk: str, finished: Path, target: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command in its own process, on a target that refuses what DBFS refuses."""
    return partial(publish_command, finished, str(target), LD_PRELOAD=failing_disk, REFUSE_UNDER=str(target))


def assert_refused(finished: Path, target: Path, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        publish(finished, str(target))
    assert not target.exists()


def is_marked_finished(target: Path) -> bool:
    with suppress(OSError, ValueError):
        return json.loads((target / "run.json").read_text())["status"] == "finished"
    return False


# --- complete copies ---------------------------------------------------------------------------------


def test_a_model_is_published_with_sequential_writes_once_and_the_copy_can_be_published_again(
    command: Callable[..., Any], finished: Path, target: Path, tmp_path: Path
) -> None:
    before = content(finished)
    result = command()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"published to {target}: 8 files, 16.0 MiB, each file read back")
    assert_complete(content(target), finished)
    assert content(finished) == before
    times = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    result = command()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{target} already holds this model, complete and unchanged: 8 files")
    assert publish(finished, str(target)) == []
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == times
    publish(target, str(tmp_path / "onwards"))
    assert content(tmp_path / "onwards") == content(target)


def test_a_large_file_gets_a_log_line_and_a_progress_bar_on_a_terminal(
    finished: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from training import files, publish; from training.storage import write; files.LARGE = write.LARGE = 2**20\n"
        f"sys.argv = ['publish', '--model', {str(finished)!r}, '--to', sys.argv[1]]; publish.main()"
    )
    logged = python("-c", program, tmp_path / "logged")
    assert re.search(
        r"^model\.safetensors: 16\.0 MiB at [\d,]+ MiB/s, read back$", logged.stdout, re.MULTILINE
    )
    assert "config.json" not in logged.stdout
    assert logged.stderr == ""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    streams = {"stdout": subprocess.DEVNULL, "stderr": terminal}
    python("-c", program, tmp_path / "seen", capture_output=False, check=True, **streams)
    os.close(terminal)
    assert re.search(r"model\.safetensors:   0%\|.*16\.0M", os.read(reader, 2**16).decode(), re.DOTALL)


# --- interrupted copies ------------------------------------------------------------------------------


def kill_and_publish_again(command: Callable[..., Any], finished: Path, target: Path, change: int) -> bool:
    """Kills the copy at its nth change to the target, checks it, and continues; False if there was no nth change."""
    before = content(target)
    killed = command(KILL_AT=f"{change}:{target}")
    assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
    after = content(target)
    after.pop("publishing.json", None)  # a repair has written its marker but changed nothing else yet
    if is_marked_finished(target) and after != before:
        assert_complete(after, finished)
    assert target_problems(str(target), finished) == [], "the run's own copy may be continued"
    again = command()
    assert again.returncode == 0, again.stderr
    assert_complete(content(target), finished)
    return killed.returncode != 0


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("change", [*sorted(random.Random(5).sample(range(1, 30), 6)), -1, -2, -3])
def test_a_copy_killed_at_a_random_moment_or_during_a_repair_is_continued(
    command: Callable[..., Any], finished: Path, target: Path, change: int
) -> None:
    if change < 0:
        publish(finished, str(target))
        cut(target / "README.md")
    assert kill_and_publish_again(command, finished, target, abs(change))


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [None, "model.safetensors", "README.md", "manifest.json", "run.json"])
def test_a_copy_killed_at_any_moment_is_continued(
    command: Callable[..., Any], finished: Path, target: Path, damaged: str | None
) -> None:
    """Both a new copy and the repair of a complete copy with one damaged file."""
    change, killed = 0, True
    while killed:
        change += 1
        shutil.rmtree(target, ignore_errors=True)
        if damaged:
            publish(finished, str(target))
            cut(target / damaged)
            if damaged == "run.json":  # as if killed while writing the record
                (target / "publishing.json").write_bytes(marker_of((finished / "run.json").read_bytes()))
        killed = kill_and_publish_again(command, finished, target, change)
    assert change > 5


def test_a_copy_that_is_killed_repeatedly_completes_in_the_end(
    command: Callable[..., Any], finished: Path, target: Path
) -> None:
    kills = 0
    while command(KILL_AT=f"{5 + kills}:{target}").returncode == -signal.SIGKILL:
        assert not is_marked_finished(target)
        kills += 1
    assert kills >= 2
    assert_complete(content(target), finished)


def test_correct_files_of_an_earlier_attempt_are_kept(
    command: Callable[..., Any], finished: Path, target: Path
) -> None:
    assert command(FULL_DISK=f"{2**20}:{target}").returncode == 2
    kept = {name: (target / name).stat().st_mtime_ns for name in ("README.md", "config.json", "ledger.json")}
    (target / "config.json").write_bytes(b"?" * 1000)  # right size, wrong bytes
    (target / "ledger.json").write_bytes(b"")
    assert publish(finished, str(target)) == [
        "config.json", "ledger.json", "model.safetensors", "tokenizer.json", "trainer_state.json",
        "manifest.json", "run.json",
    ]  # fmt: skip
    assert (target / "README.md").stat().st_mtime_ns == kept["README.md"]
    assert_complete(content(target), finished)


# --- files that read back wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["publishing.json", "config.json", "model.safetensors", "manifest.json", "run.json"]
)
def test_a_file_that_reads_back_wrong_is_rewritten_once_and_then_refused(
    command: Callable[..., Any], finished: Path, target: Path, name: str
) -> None:
    result = command(FLIP_BIT=f"1:{target / name}")
    assert result.returncode == 0, result.stderr
    assert f"{target / name}: the bytes read back differ from the bytes written\n" in result.stdout
    assert_complete(content(target), finished)
    shutil.rmtree(target)
    result = command(FLIP_BIT=f"99:{target / name}")
    assert result.returncode == 2
    assert result.stderr == (
        f"Cannot publish: {target / name}: the bytes read back differ from the bytes written, twice. "
        f"The model in {finished} is complete, and the files copied so far are kept. Fix the cause, then type "
        f"python -m training.publish --model {finished} --to {target}\n"
    )
    assert not {"run.json", name} & content(target).keys()
    assert command().returncode == 0
    assert_complete(content(target), finished)


# --- a source or a target that changes during the copy -----------------------------------------------------


def before_the_weights(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Calls `act` when the copy reaches the weights."""
    real = copy_module.write_checked

    def write(target: Any, name: str, *args: Any) -> None:
        if name == "model.safetensors":
            act()
        real(target, name, *args)

    monkeypatch.setattr(copy_module, "write_checked", write)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "changed while it was copied"),
        (cut, "changed while it was copied"),
        (lambda file: file.unlink(), r"cannot be read \(No such file or directory\)"),
    ],
    ids=["other bytes", "cut", "removed"],
)
def test_a_source_that_changes_during_the_copy_is_reported_and_not_called_complete(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any], message: str
) -> None:
    weights = finished / "model.safetensors"
    original = weights.read_bytes()
    before_the_weights(monkeypatch, lambda: change(weights))
    with pytest.raises(PublishError, match=f"{weights}: {message}. {finished} must not change") as error:
        publish(finished, str(target))
    assert "is complete" not in str(error.value)
    assert not {"run.json", weights.name} & content(target).keys()
    monkeypatch.undo()
    weights.write_bytes(original)
    publish(finished, str(target))
    assert_complete(content(target), finished)


def test_an_unreadable_source_is_reported_before_anything_is_written(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    assert_refused(finished, target, r"model\.safetensors: cannot be read \(Input/output error\)")


def test_a_target_that_turns_read_only_is_reported_and_the_copy_continues_later(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remount = ["mount", "-o", "remount,ro", tmp_path / "disk"]
    with mounted(tmp_path / "disk", "64m") as disk:
        target = disk / "copy"
        before_the_weights(monkeypatch, lambda: subprocess.run(remount, check=True))
        with pytest.raises(PublishError, match=r"Read-only file system\. The model in .* is complete"):
            publish(finished, str(target))
        assert not (target / "run.json").exists()
        monkeypatch.undo()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert "README.md" not in publish(finished, str(target)), "already copied"
        assert_complete(content(target), finished)


# --- space -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 50, 1000, 2**20, 2**24])
def test_a_full_disk_is_reported_and_the_copy_continues_when_there_is_room(
    command: Callable[..., Any], finished: Path, target: Path, room: int
) -> None:
    before = content(finished)
    result = command(FULL_DISK=f"{room}:{target}")
    assert result.returncode == 2
    assert "cannot be written: no space is left there. The model in" in result.stderr
    assert f"type python -m training.publish --model {finished} --to {target}\n" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (target / "run.json").exists()
    assert content(finished) == before
    assert command().returncode == 0
    assert_complete(content(target), finished)


def disk_stats(free: int, blocks: int = 2**40) -> Callable[[Any], SimpleNamespace]:
    return lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=blocks)


def test_a_target_with_too_little_room_is_refused_before_anything_is_written(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", disk_stats(2**24))
    assert_refused(finished, target, r"16\.0 MiB are needed, but 16\.0 MiB are free. Make room")
    monkeypatch.setattr(os, "statvfs", disk_stats(2**25))
    publish(finished, str(target))
    (target / "README.md").write_bytes(b"")  # the other files need no space: they are already copied
    monkeypatch.setattr(os, "statvfs", disk_stats(2**16))
    assert "README.md" in publish(finished, str(target))


@pytest.mark.parametrize(("free", "blocks"), [(0, 0), (0, 100), (2**62, 2**63), (2**10, 10)])
def test_disk_sizes_that_dbfs_makes_up_do_not_stop_the_copy(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch, free: int, blocks: int
) -> None:
    monkeypatch.setattr(os, "statvfs", disk_stats(free, blocks))
    publish(finished, str(target))
    assert_complete(content(target), finished)


# --- refusals ----------------------------------------------------------------------------------------


def test_weights_that_differ_from_the_verified_ones_are_refused(finished: Path, target: Path) -> None:
    weights = finished / "model.safetensors"
    original = weights.read_bytes()
    verified = {weights.name: {"sha256": hashlib.sha256(original).hexdigest()}}
    (finished / "run.json").write_text(json.dumps(RUN | {"weights": verified}))
    weights.write_bytes(original[: len(original) // 2])
    assert_refused(finished, target, "differs from the file that training wrote and verified")
    weights.write_bytes(original)
    publish(finished, str(target))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"status": "running"}', r"did not finish. Type its training command again, with --resume auto"),
        ("[]", "did not finish"),
        ("", r"run\.json: cannot be read"),
        (None, r"there is no run\.json, so no run wrote its model here. Name a run's --local-output-dir"),
    ],
)
def test_a_source_that_is_not_a_finished_run_is_refused(
    finished: Path, target: Path, record: str | None, message: str
) -> None:
    (finished / "run.json").unlink() if record is None else (finished / "run.json").write_text(record)
    assert_refused(finished, target, message)


def other_run(target: Path) -> None:
    folder = target.parent / "other"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"other")
    (folder / "run.json").write_text(json.dumps(RUN | {"steps": 7}))
    publish(folder, str(target))


def incomplete_other_run(target: Path) -> None:
    other_run(target)
    (target / "publishing.json").write_bytes(marker_of((target / "run.json").read_bytes()))
    (target / "run.json").unlink()


def copy_with_foreign_files(target: Path) -> None:
    publish(target.parent / "out", str(target))
    (target / "notes.txt").write_text("mine")
    (target / "config.json").unlink()
    (target / "config.json").mkdir()


def unrelated_model(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"precious")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (other_run, r"already holds another run's model, or part of it \(manifest.json, model.safetensors, run.json\). Name"),
        (incomplete_other_run, "already holds another run's model, or part of it"),
        (copy_with_foreign_files, r"holds files that are not part of this model \(config.json, notes.txt\). Name a new folder, or move them away"),
        (unrelated_model, r"already holds something \(config.json, model.safetensors\). Name a new folder"),
        (lambda target: (target / "results").mkdir(parents=True), r"already holds something \(results\)"),
        (lambda target: target.write_text("precious"), "already holds something: it is a file. Name a new folder"),
    ],
)  # fmt: skip
def test_a_target_with_other_files_is_refused_and_left_unchanged(
    finished: Path, target: Path, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(target)
    before = (target.is_file(), sorted(target.rglob("*")), content(target))
    with pytest.raises(PublishError, match=message):
        publish(finished, str(target))
    assert (target.is_file(), sorted(target.rglob("*")), content(target)) == before


def test_before_training_the_target_must_be_empty_or_a_copy_of_this_run(
    finished: Path, target: Path, tmp_path: Path
) -> None:
    assert target_problems(str(target), finished) == []
    target.mkdir()
    assert target_problems(str(target)) == []
    publish(finished, str(target))
    assert target_problems(str(target), finished) == []
    expected = "already holds something (README.md, config.json, ledger.json, ...). Name a new folder"
    for folder in (None, tmp_path / "none"):
        [problem] = target_problems(str(target), folder)
        assert problem.endswith(expected)
    (finished / "run.json").write_text('{"status": "running"}')
    assert len(target_problems(str(target), finished)) == 1
    assert content(target).keys() == PUBLISHED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dbfs:/dolly", "dbfs:/dolly: is a URL, but a path is needed. Type /dbfs/dolly"),
        ("hf:/me/dolly", "hf:/me/dolly: would be a folder on this machine. Type hf://me/dolly"),
        ("s3:bucket/x", "s3:bucket/x: would be a folder on this machine. Type s3://bucket/x"),
        ("zz9://x/y", "there is no file system 'zz9'. Name a folder, or a URL such as s3://bucket/folder"),
        ("s3://", "names no bucket. Type s3://bucket/folder"),
        ("memory://x/y", "is in the memory of this process, and would be lost with it. Name a folder"),
        ("file:///proc/none/dolly", "file:///proc/none/dolly: cannot be written"),
        ("data://x", "data://x: its file system cannot list files"),
        ("sftp://me:hunter2@host/x", "sftp://***@host/x: holds a password"),
        ("s3://AKIA:hun/ter2@bucket/x", "s3://***@bucket/x: holds a password"),
    ],
)
def test_an_impossible_target_is_refused(finished: Path, name: str, message: str) -> None:
    [problem] = target_problems(name)
    assert message in problem
    assert "hunter2" not in problem
    with pytest.raises(PublishError, match=re.escape(message)):
        publish(finished, name)


def test_a_missing_databricks_mount_and_the_models_own_folder_are_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = Path("/") / f"no-{os.getpid()}-dbfs"
    monkeypatch.setattr(files, "MOUNTS", (str(mount),))
    assert_refused(finished, mount / "dolly", f"there is no {mount} on this machine. Name another folder")
    assert not mount.exists()
    with pytest.raises(PublishError, match=r"is the run's own output folder\. Name another folder"):
        publish(finished, str(finished / "runs" / ".."))
