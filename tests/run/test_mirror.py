"""--checkpoint-to: checkpoints are copied in the background, and nothing that happens to the target ends a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3fs.core import S3File

from tests.storage.conftest import content
from training.errors import PublishError
from training.files import write_json
from training.run import mirror
from training.run.mirror import Mirror
from training.storage import checkpoint, remote, s3_checksum, write
from training.storage.record import write_run_record


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    write_run_record(folder, {"status": "running", "id": "of-the-run", "options": {}})
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def start(output: Path) -> Iterator[Callable[..., Mirror]]:
    """Starts mirrors of the run, and stops them at the end."""
    mirrors = []

    def begin(name: object, limit: int = 2, step: int = 0) -> Mirror:
        record = json.loads((output / "run.json").read_text())
        mirrors.append(Mirror(str(name), output, record, step, limit))
        return mirrors[-1]

    yield begin
    for started in mirrors:
        started.close(0)


def save(output: Path, step: int, eval_loss: float | None = None, size: int = 1000) -> Path:
    """Writes a complete checkpoint with files in it and in a folder of it."""
    folder = output / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}" / "optim_states.pt").write_bytes(os.urandom(size))
    write_json(folder / checkpoint.PROGRESS_FILE, {"loss_sums": [float(step)]})
    files = checkpoint.digests(folder, checkpoint.files_of(folder))
    checkpoint.write_manifest(folder, eval_loss, [], files)
    return folder


def wait_for(reached: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def copies(target: object) -> dict[int, dict[str, Any]]:
    return remote.complete_checkpoints(*remote.open_store(str(target)))


def is_copied(target: Path, step: int) -> bool:
    return checkpoint.read_manifest(target / f"checkpoint-{step}") is not None


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_each_checkpoint_is_copied_with_the_files_of_its_run_and_its_manifest_last(
    output: Path, target: Path, s3: Any, start: Callable, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_checksum, "PART", 5 * 2**20)
    monkeypatch.setitem(s3_checksum.WITH_CHECKSUMS, "block_size", 5 * 2**20)
    written: list[str] = []
    real = write.write_checked
    monkeypatch.setattr(
        remote, "write_checked", lambda t, name, *a: (real(t, name, *a), written.append(name))
    )
    if place == "s3":  # the store's checksum is enough
        monkeypatch.setattr(write, "target_digest", lambda *_: pytest.fail("read back"))
    name = target if place == "folder" else "s3://models/a/b"
    copying = start(name)
    folder = save(output, 3, 1.5, 12 * 2**20)
    copying.wake(Path())
    copying.close(None)
    assert written[0].startswith("attempt-1-")
    assert sorted(written[1:-1]) == sorted(
        f"checkpoint-3/{n}" for n in [*checkpoint.files_of(folder), "run.json", "metrics.jsonl"]
    )
    assert written[-1] == "checkpoint-3/manifest.json"
    [(step, manifest)] = copies(name).items()
    assert step == 3
    assert remote.without_run(manifest) == checkpoint.read_manifest(folder)
    assert manifest["run"] == "of-the-run"
    opened, _ = remote.open_store(str(name))
    for file in checkpoint.files_of(folder):
        assert opened.fs.cat_file(opened.file(f"checkpoint-3/{file}")) == (folder / file).read_bytes()


def test_a_copy_that_falls_behind_takes_the_newest_and_the_best_and_skips_the_others(
    output: Path, target: Path, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, copied = threading.Event(), []
    real = remote.copy_checkpoint

    def slow(*arguments: Any) -> Any:
        copied.append(arguments[1].name)
        assert may_go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(remote, "copy_checkpoint", slow)
    copying = start(target, limit=4)
    save(output, 1, 9.0)
    copying.wake(Path())
    wait_for(lambda: copied)
    assert copying.busy == output / "checkpoint-1"
    for step, loss in ((2, 3.0), (3, 1.0), (4, 2.0), (5, 2.5)):
        save(output, step, loss)
        copying.wake(Path())
    checkpoint.rotate(output, 2, copying.is_copying)
    assert sorted(map(checkpoint.step_of, checkpoint.checkpoints(output))) == [1, 3, 5], "the busy one stays"
    may_go_on.set()
    copying.close(None)
    assert copied == ["checkpoint-1", "checkpoint-5", "checkpoint-3"]
    assert sorted(copies(target)) == [1, 3, 5]


@pytest.mark.parametrize(("limit", "kept"), [(1, [3, 5]), (2, [3, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_as_many_checkpoints_are_kept_at_the_target_as_in_the_run(
    output: Path, target: Path, start: Callable, limit: int, kept: list[int]
) -> None:
    copying = start(target, limit)
    for step, loss in ((1, 5.0), (2, 4.0), (3, 1.0), (4, 2.0), (5, 2.5)):
        save(output, step, loss)
        copying.wake(Path())
        wait_for(lambda step=step: is_copied(target, step) and copying.busy is None)
        checkpoint.rotate(output, limit, copying.is_copying)
    copying.close(None)
    assert sorted(copies(target)) == kept
    assert sorted(map(checkpoint.step_of, checkpoint.checkpoints(target))) == kept, "nothing else is left"
    assert sorted(map(checkpoint.step_of, checkpoint.checkpoints(output))) == kept


def test_a_target_that_disappears_is_warned_about_once_and_the_copy_goes_on_when_it_is_back(
    output: Path,
    target: Path,
    start: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mirror, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE", 0.1)
    caplog.set_level(logging.INFO)
    gone, tries = threading.Event(), []
    real = write._open

    def opened(source: Any) -> Any:
        if gone.is_set():
            tries.append(source)
            raise PublishError("s3://models: cannot be reached")
        return real(source)

    monkeypatch.setattr(write, "_open", opened)
    copying = start(target)
    save(output, 1)
    copying.wake(Path())
    wait_for(lambda: is_copied(target, 1) and copying.busy is None)
    gone.set()
    save(output, 2)
    copying.wake(Path())
    wait_for(lambda: len(tries) > 12)
    save(output, 3)
    copying.wake(Path())
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["s3://models: cannot be reached. Training continues, and the copy is tried again"]
    gone.clear()
    copying.close(None)
    assert sorted(copies(target)) == [1, 3], "2 was skipped, because 3 is newer"
    assert "all checkpoints are copied again" in caplog.text


def test_at_the_end_a_target_that_is_away_is_tried_once_more_and_what_is_missing_is_named(
    output: Path,
    target: Path,
    start: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target.write_text("a file in place of the folder")
    copying = start(target)
    save(output, 7)
    copying.wake(Path())
    wait_for(lambda: copying._problem)
    begin = time.monotonic()
    copying.close(None)
    assert time.monotonic() - begin < 3
    assert (
        f"checkpoint-7 is not copied to {target} ({target}: already holds something: it is a file"
        in caplog.text
    )
    assert "no checkpoint is complete there" in caplog.text


def test_after_a_signal_the_wait_is_bounded(
    output: Path,
    target: Path,
    start: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(remote, "copy_checkpoint", lambda *a: hangs.wait(20) and a[2])
    copying = start(target)
    save(output, 7)
    copying.wake(Path())
    wait_for(lambda: copying.busy)
    begin = time.monotonic()
    copying.close(0.3)
    assert 0.3 <= time.monotonic() - begin < 2
    assert "checkpoint-7 is not copied" in caplog.text
    assert "the copy took longer than the run could wait" in caplog.text
    hangs.set()


def test_an_older_attempt_stops_writing_when_it_finds_a_newer_one(
    output: Path, target: Path, start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    older = start(target)
    save(output, 1)
    older.wake(Path())
    wait_for(lambda: is_copied(target, 1) and older.busy is None)
    newer = start(target, step=1)
    wait_for(lambda: newer._target is not None)
    assert sorted(copies(target)) == [1], "the newer attempt continues from the checkpoint of the older"
    before = content(target)
    save(output, 2)
    older.wake(Path())
    older.close(None)
    assert content(target) == before, "nothing was written"
    assert "a newer attempt of this run writes its checkpoints there (attempt-2-" in caplog.text
    assert "This attempt copies no more checkpoints; training continues" in caplog.text
    newer.wake(Path())
    newer.close(None)
    assert sorted(copies(target)) == [1, 2]
    assert len(list(target.glob("attempt-*.json"))) == 1


def test_a_damaged_part_is_found_by_the_checksum_of_s3_and_sent_again(
    output: Path, s3: Any, start: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_checksum, "PART", 5 * 2**20)
    monkeypatch.setitem(s3_checksum.WITH_CHECKSUMS, "block_size", 5 * 2**20)
    real, damaged = S3File._call_s3, []

    def call(self: Any, method: str, *more: Any, **how: Any) -> Any:
        if method == "upload_part" and how["PartNumber"] == 2 and not damaged:
            damaged.append(how["Key"])
            how["Body"] = how["Body"][:-1] + bytes([how["Body"][-1] ^ 1])
        return real(self, method, *more, **how)

    monkeypatch.setattr(S3File, "_call_s3", call)
    copying = start("s3://models/x")
    folder = save(output, 1, size=11 * 2**20)
    copying.wake(Path())
    copying.close(None)
    assert damaged == ["x/checkpoint-1/global_step1/optim_states.pt"]
    assert "the bytes read back differ" in caplog.text
    copied = s3.cat_file(f"models/{damaged[0]}")
    assert copied == (folder / "global_step1" / "optim_states.pt").read_bytes()
    assert sorted(copies("s3://models/x")) == [1]


def test_a_damaged_file_of_the_run_is_not_copied_and_a_removed_one_neither(
    output: Path, s3: Any, target: Path, start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("s3://models/x", target):
        copying = start(name)
        given_up = copying._given_up
        folder = save(output, 1)
        (folder / "global_step1" / "optim_states.pt").write_bytes(b"?" * 1000)
        copying.wake(Path())
        wait_for(given_up.__len__)
        assert "optim_states.pt: changed while it was copied" in caplog.text
        shutil.rmtree(folder)
        folder = save(output, 2)
        (folder / "global_step2" / "optim_states.pt").unlink()
        copying.wake(Path())
        wait_for(lambda given_up=given_up: len(given_up) == 2)
        save(output, 3)
        copying.wake(Path())
        copying.close(None)
        assert sorted(copies(name)) == [3], "training went on, and the next one is copied"
        shutil.rmtree(output / "checkpoint-2")
        shutil.rmtree(output / "checkpoint-3")


def test_a_checkpoint_that_is_removed_before_its_copy_is_no_longer_in_use(
    output: Path, target: Path, start: Callable
) -> None:
    copying = start(target)
    wait_for(lambda: copying._target)
    removed = output / "checkpoint-3"
    copying._copy(removed)
    assert not copying.is_copying(removed)


def test_a_copy_that_is_killed_leaves_no_manifest_and_the_next_attempt_replaces_it(
    output: Path, target: Path, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(output, 1)
    for count in range(5):  # files that arrive before the kill
        with monkeypatch.context() as patch:
            real, written = write.write_checked, []

            def write_until_killed(*arguments: Any, real=real, written=written, count=count) -> None:
                if "checkpoint" in arguments[1]:
                    if len(written) == count:
                        raise SystemExit  # the thread is gone without any cleaning up
                    written.append(arguments[1])
                real(*arguments)

            patch.setattr(remote, "write_checked", write_until_killed)
            patch.setattr(remote, "FILES_AT_ONCE", 1)
            patch.setattr(threading, "excepthook", lambda _: None)
            killed = start(target)
            killed._thread.join(20)
            assert len(written) == count
        assert copies(target) == {}
    copying = start(target)
    copying.close(None)
    assert sorted(copies(target)) == [1]


def test_a_held_out_loss_that_a_resume_adds_reaches_the_target_without_the_files_again(
    output: Path, target: Path, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(output, 1)
    start(target).close(None)
    manifest = checkpoint.read_manifest(folder)
    checkpoint.write_manifest(folder, 0.5, manifest["model"], manifest["files"])
    written: list[str] = []
    real = write.write_checked
    monkeypatch.setattr(
        remote, "write_checked", lambda t, name, *a: (real(t, name, *a), written.append(name))
    )
    start(target, step=1).close(None)
    assert sorted(written[1:]) == [
        f"checkpoint-1/{n}" for n in ("manifest.json", "metrics.jsonl", "run.json")
    ]
    assert copies(target)[1]["eval_loss"] == 0.5


def test_a_target_with_other_things_or_that_is_the_run_s_own_folder_is_refused(
    output: Path, target: Path, s3: Any
) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for name, words in (
        (target, "holds something else than a run's checkpoints (notes.txt). Name a new folder"),
        (output, "is the run's own folder"),
        (output / "copies", "is the run's own folder"),
        (output.parent, "is the run's own folder"),
        (f"file://{output}", "is the run's own folder"),
        (f"file://{output}/copies", "is the run's own folder"),
        ("s3://none/x", "there is no bucket 'none'. Make it first"),
    ):
        [problem] = remote.store_problems(str(name), output, "never")
        assert words in problem
    (target / "notes.txt").unlink()
    (target / "checkpoint-500").mkdir()
    [problem] = remote.store_problems(str(target), output, "auto")
    assert "(checkpoint-500)" in problem, "of another program: it is never removed"
    assert remote.store_problems("s3://models/x", output, "never") == []
    assert s3.find("models/x") == [], "the trial leaves nothing"


def test_a_new_run_refuses_the_checkpoints_of_another(output: Path, target: Path, start: Callable) -> None:
    save(output, 4)
    start(target).close(None)
    [problem] = remote.store_problems(str(target), output.with_name("new"), "never")
    assert problem == (
        f"{target}: holds checkpoints of another run (the newest is checkpoint-4). Type --resume auto to continue that "
        "run, or name a new folder"
    )
    assert remote.store_problems(str(target), output.with_name("new"), "auto") == []


def test_a_named_checkpoint_never_costs_the_copies_of_another_run_or_newer_ones(
    output: Path, target: Path, start: Callable
) -> None:
    own = save(output, 4)
    start(target).close(None)
    assert remote.store_problems(str(target), output, str(own)) == [], "its own past"
    fork = output.with_name("fork")
    no_checkpoint = output / "final"  # refused by another check, which reports it in the same message
    for resume, folder in (
        (own, fork),
        (save(fork, 4), fork),
        (save(output, 2), output),
        (no_checkpoint, output),
    ):
        [problem] = remote.store_problems(str(target), folder, str(resume))
        assert problem == (
            f"{target}: holds checkpoints of another run than {resume}, or newer ones (the newest is checkpoint-4). "
            "Type --resume auto to continue that run, or name a new folder"
        )
    assert remote.store_problems(str(target.with_name("new")), fork, str(own)) == []


def test_copies_of_another_run_are_never_removed_and_the_copying_stops(
    output: Path, target: Path, start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    save(output, 4)
    start(target).close(None)
    before = content(target)
    write_run_record(output, {"status": "running", "id": "of-another", "options": {}})
    save(output, 2)
    start(target, step=2).close(None)
    assert content(target) == before
    assert (
        f"{target}: holds checkpoints of another run (checkpoint-4), which are kept. This attempt"
        in caplog.text
    )


def test_a_target_that_was_away_or_was_replaced_is_opened_again_and_stays_usable(
    output: Path, target: Path, start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    away = target.with_name("away")

    def copy(step: int) -> None:
        save(output, step)
        copying.wake(Path())
        wait_for(lambda: is_copied(target, step) and copying.busy is None)

    copying = start(target)
    copy(1)
    target.rename(away)
    copy(2)
    assert sorted(copies(target)) == [2]
    assert "the file of this attempt, is gone. The target is opened again" in caplog.text
    shutil.rmtree(target)
    away.rename(target)
    copy(3)
    assert sorted(copies(target)) == [1, 3], "what was there is kept"
    assert len(list(target.glob("attempt-3-*.json"))) == len(list(target.glob("attempt-*"))) == 1
    assert copying._thread.is_alive(), "it never takes its own earlier attempt for another"
    next(target.glob("attempt-*")).unlink()
    save(output, 4)
    copying.wake(Path())
    copying.close(None)
    assert sorted(copies(target)) == [3, 4]


def test_copies_without_an_attempt_s_file_are_a_run_s_and_other_folders_are_not(
    output: Path, target: Path, start: Callable
) -> None:
    save(output, 4)
    start(target).close(None)
    next(target.glob("attempt-*")).unlink()
    assert remote.store_problems(str(target), output, "auto") == []
    shutil.copytree(output / "checkpoint-4", target / "checkpoint-5")
    [problem] = remote.store_problems(str(target), output, "auto")
    assert "holds something else than a run's checkpoints (checkpoint-5)" in problem


def test_two_new_runs_do_not_share_a_target(
    output: Path, target: Path, start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(target)
    wait_for(lambda: first._target is not None)
    [attempt] = target.glob("attempt-*")
    assert remote.store_problems(str(target), output.with_name("new"), "auto") == []
    [problem] = remote.store_problems(str(target), output.with_name("new"), "never")
    assert problem == (
        f"{target}: another run has begun to copy its checkpoints there ({attempt.name}). Name a new folder, or remove "
        "that file if the run has ended"
    )
    write_run_record(output, {"status": "running", "id": "of-another", "options": {}})
    second = start(target)  # it began at the same moment
    wait_for(lambda: second._target is not None)
    save(output, 1)
    first.wake(Path())
    first.close(None)
    assert f"{target}: another run writes its checkpoints there (attempt-2-" in caplog.text
