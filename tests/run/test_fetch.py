"""--resume auto with --checkpoint-to: what is fetched from the target, what is refused, and that no run begins anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import resolved, settings_of_a_run
from tests.run.test_resume import make_run, options_of, start_of
from training.consts import GIB
from training.errors import OptionsError
from training.files import write_json
from training.plan.lookup import model_shape
from training.plan.memory import disk, remote_gib
from training.run import fetch, start
from training.run.identity import check_same_run, new_record, recorded_test_size
from training.run.mirror import Mirror
from training.run.preflight import destination_problems
from training.storage import checkpoint, remote
from training.storage.record import read_run_record, write_run_record


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def copied_run(output: Path, target: Path, *steps: int, **record: Any) -> None:
    """Makes a run with checkpoints at these steps, and copies them all to the target."""
    make_run(output, *steps, id="of-the-run", **record)
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for step in steps:  # also those that a copy would skip
        folder = output / f"checkpoint-{step}"
        for later in [s for s in steps if s > step]:
            (output / f"checkpoint-{later}").rename(output / f"later-{later}")
        Mirror(str(target), output, read_run_record(output), step, 100).close(None)
        for later in [s for s in steps if s > step]:
            (output / f"later-{later}").rename(output / f"checkpoint-{later}")
        assert checkpoint.read_manifest(target / folder.name)


def fetch_into(output: Path, target: object, **changed: Any) -> None:
    options = options_of(output, checkpoint_to=str(target), **changed)
    now = new_record(resolved(options), "rows")
    fetch.fetch_newest(resolved(options), lambda former: check_same_run(former, now, options.force))


def refusal(output: Path, target: object, **changed: Any) -> str:
    with pytest.raises(OptionsError) as error:
        fetch_into(output, target, **changed)
    return str(error.value)


def test_an_empty_folder_gets_the_newest_checkpoint_with_the_files_of_its_run(
    tmp_path: Path, target: Path
) -> None:
    lost, new = tmp_path / "lost", tmp_path / "new"
    copied_run(lost, target, 3, 6)
    fetch_into(new, target)
    assert sorted(os.listdir(new)) == ["checkpoint-6", "metrics.jsonl", "run.json"]
    assert checkpoint.problems_of(new / "checkpoint-6") == []
    for name in ("run.json", "metrics.jsonl", "checkpoint-6/manifest.json", "checkpoint-6/optimizer.pt"):
        assert (new / name).read_bytes() == (lost / name).read_bytes()
    found = start_of(new)
    assert (found.folder, found.former["id"]) == (new / "checkpoint-6", "of-the-run")


@pytest.mark.parametrize(
    ("here", "there", "taken"), [([3], [3, 6], 6), ([3, 6], [3], 6), ([3, 6], [6], 6), ([], [3], 3)]
)
def test_the_newest_checkpoint_wins_wherever_it_is(
    tmp_path: Path, target: Path, here: list[int], there: list[int], taken: int
) -> None:
    copied_run(tmp_path / "lost", target, *there)
    make_run(tmp_path / "out", *here, id="of-the-run")
    before = set(os.listdir(tmp_path / "out"))
    fetch_into(tmp_path / "out", target)
    assert start_of(tmp_path / "out").step == taken
    assert (set(os.listdir(tmp_path / "out")) == before) is (taken in here)


def test_nothing_is_fetched_from_an_empty_target_or_without_auto(tmp_path: Path, target: Path) -> None:
    fetch_into(tmp_path / "out", target)
    copied_run(tmp_path / "lost", target, 3)
    fetch_into(tmp_path / "out", target, resume="never")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_refused_and_the_checkpoint_before_it_is_taken(
    tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied_run(tmp_path / "lost", target, 3, 6, 9)
    (target / "checkpoint-9" / "optimizer.pt").write_bytes(b"momentS")
    (target / "checkpoint-6" / "progress.json").write_bytes(b"{}")
    fetch_into(tmp_path / "out", target)
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint-3", "metrics.jsonl", "run.json"]
    assert f"{target}/checkpoint-9/optimizer.pt has changed since it was written is skipped" in caplog.text
    assert f"{target}/checkpoint-6/progress.json has 2 bytes instead of" in caplog.text
    (target / "checkpoint-3" / "metrics.jsonl").write_bytes(b"")
    message = refusal(tmp_path / "new", target)
    assert "every checkpoint there is damaged" in message
    assert checkpoint.checkpoints(tmp_path / "new") == []


def test_a_target_that_cannot_be_read_stops_auto_and_nothing_begins_anew(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_text("a file")
    assert "The run may have checkpoints there, so --resume auto does not start at step 0" in refusal(
        tmp_path / "out", target
    )
    target.unlink()
    copied_run(tmp_path / "lost", target, 3)
    for name in ("run.json", "manifest.json", "optimizer.pt"):
        with monkeypatch.context() as patch:

            def unreadable(self: Any, file: str, name: str = name) -> str:
                return f"{target}/gone\0" if file == f"checkpoint-3/{name}" else f"{self.path}/{file}"

            patch.setattr(remote.Target, "file", unreadable)
            assert f"--checkpoint-to {target}/checkpoint-3/{name}: cannot be read" in refusal(
                tmp_path / "out", target
            )
            assert not (tmp_path / "out" / "run.json").exists()


def test_another_run_and_other_options_are_refused_before_a_byte_is_fetched(
    tmp_path: Path, target: Path
) -> None:
    copied_run(tmp_path / "lost", target, 3)
    make_run(tmp_path / "other", 1, id="another")
    assert "holds checkpoints of another run" in refusal(tmp_path / "other", target)
    assert "--lr was 1e-05, but is now 1.0" in refusal(tmp_path / "out", target, lr=1.0)
    assert not (tmp_path / "out").exists()
    fetch_into(tmp_path / "out", target, lr=1.0, force=True)
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, target: Path) -> None:
    copied_run(tmp_path / "lost", target, 3)
    manifest = checkpoint.read_manifest(target / "checkpoint-3")
    for name in ("../../stolen", "/tmp/stolen"):
        files = {**manifest["files"], name: {"size": 1, "sha256": ""}}
        sealed = checkpoint.sealed(manifest | {"files": files})
        write_json(target / "checkpoint-3" / "manifest.json", sealed)
        assert "names a file outside its folder" in refusal(tmp_path / "out", target)


def test_a_fetch_that_is_killed_is_repeated(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_run(tmp_path / "lost", target, 3)
    real, calls = os.replace, 0
    for killed_at in range(3):  # run.json, metrics.jsonl, the checkpoint
        calls = 0

        def replace(*names: Any, killed_at: int = killed_at) -> None:
            nonlocal calls
            if "fetched" in str(names[0]) and not str(names[0]).endswith(".partial"):
                calls += 1
                if calls > killed_at:
                    raise SystemExit
            real(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(SystemExit):
                fetch_into(tmp_path / "out", target)
        assert not checkpoint.checkpoints(tmp_path / "out")
        fetch_into(tmp_path / "out", target)
        assert start_of(tmp_path / "out").step == 3
        shutil.rmtree(tmp_path / "out")


def test_the_number_of_held_out_rows_is_that_of_the_run_at_the_target(tmp_path: Path, target: Path) -> None:
    copied_run(tmp_path / "lost", target, 3)
    record = read_run_record(tmp_path / "lost")
    write_run_record(tmp_path / "lost", record | {"options": record["options"] | {"test_size": 17}})
    shutil.rmtree(target)
    Mirror(str(target), tmp_path / "lost", record, 3, 2).close(None)
    options = options_of(tmp_path / "out", checkpoint_to=str(target))
    assert recorded_test_size(options) == 17
    assert remote.newer_copies(str(target), "auto", tmp_path / "out").record["id"] == "of-the-run"


def test_a_target_that_cannot_be_used_is_refused_with_the_other_options(tmp_path: Path, target: Path) -> None:
    def problems(name: object, **more: Any) -> list[str]:
        options = options_of(tmp_path / "out", **{"resume": "never", "checkpoint_to": str(name)} | more)
        return destination_problems(options)

    assert problems(target) == []
    assert not target.exists(), "nothing is left there before training"
    [problem] = problems(f"{target}/", dbfs_output_dir=str(target))
    assert problem == (
        f"--checkpoint-to {target}/: is the same folder as --dbfs-output-dir, which holds the model. Name another folder"
    )
    [problem] = problems(tmp_path / "out" / "copies")
    assert problem.startswith(
        f"--checkpoint-to {tmp_path}/out/copies: is the run's own folder {tmp_path}/out"
    )
    [problem] = problems("dbfs:/copies")
    assert problem == "--checkpoint-to dbfs:/copies: is a URL, but a path is needed. Type /dbfs/copies"
    copied_run(tmp_path / "lost", target, 3)
    [problem] = problems(target)
    assert "holds checkpoints of another run" in problem
    assert problems(target, resume="auto") == []


def test_the_plan_tells_what_is_copied_and_keeps_one_checkpoint_more_on_the_disk() -> None:
    model = model_shape("EleutherAI/gpt-j-6B", False)
    alone, copying = (
        settings_of_a_run(ranks=8, save_steps=200, checkpoint_to=to) for to in (None, "s3://bucket/x")
    )
    size = copying.checkpoint_bytes * model.parameters / GIB
    assert remote_gib(model, alone, 800) == {}
    assert remote_gib(model, copying, 800) == {
        "a checkpoint": size,
        "all, at most": 4 * size,
        "kept there, at most": 3 * size,
    }
    before, after = (disk(model, settings, 8000)["checkpoints"] for settings in (alone, copying))
    assert (before, after) == (pytest.approx(3 * size), pytest.approx(4 * size))


def test_a_run_from_another_s_checkpoint_has_an_id_of_its_own_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "rows_digest", lambda *_: "rows")
    rows = SimpleNamespace(train_rows=None, held_out_rows=None, sources=[])
    make_run(tmp_path / "source", 3, id="of-the-source")
    named, new = tmp_path / "source" / "checkpoint-3", tmp_path / "new"

    def record_of(output: Path, resume: str) -> dict[str, Any]:
        return start.find(resolved(options_of(output, resume=resume)), rows, 12)[1]

    assert (
        record_of(named.parent, "auto")["id"] == record_of(named.parent, str(named))["id"] == "of-the-source"
    )
    record = record_of(new, str(named))
    assert (record["id"] == "of-the-source", record["begun_from"]) == (False, str(named))
    new.mkdir()
    write_run_record(new, record)
    for resume in ("auto", str(named)):
        assert record_of(new, resume)["id"] == record["id"]


def test_a_run_from_another_s_checkpoint_does_not_take_a_third_run_s_copies(
    tmp_path: Path, target: Path
) -> None:
    copied_run(tmp_path / "lost", target, 3)
    make_run(tmp_path / "new", id="of-the-fork", begun_from=str(tmp_path / "source" / "checkpoint-2"))
    assert "holds checkpoints of another run" in refusal(tmp_path / "new", target)


@pytest.mark.parametrize(
    ("here", "there", "taken"), [([6], [6], 6), ([6], [3], 3), ([3, 6], [6], 6), ([3, 6], [3], 3)]
)
def test_an_intact_copy_is_taken_in_place_of_a_damaged_checkpoint(
    tmp_path: Path, target: Path, here: list[int], there: list[int], taken: int
) -> None:
    copied_run(tmp_path / "lost", target, *there)
    make_run(tmp_path / "out", *here, id="of-the-run")
    (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").write_bytes(b"momentS")
    fetch_into(tmp_path / "out", target)
    assert start_of(tmp_path / "out").step == taken


def test_where_all_is_damaged_a_new_folder_alone_is_not_said_to_start_at_step_0(
    tmp_path: Path, target: Path
) -> None:
    copied_run(tmp_path / "out", target, 3)
    for folder in (tmp_path / "out", target):
        (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"momentS")
    fetch_into(tmp_path / "out", target)
    with pytest.raises(OptionsError) as error:
        start_of(tmp_path / "out", checkpoint_to=str(target))
    assert "name a new --local-output-dir and a new --checkpoint-to to start at step 0" in str(error.value)
