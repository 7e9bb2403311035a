"""Checkpoints: damage is detected and named, and rotation keeps the newest and the best."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.storage import checkpoint
from training.storage.checkpoint import MANIFEST_FILE, best, checkpoints, problems_of, read_manifest, rotate

MODEL, RANK_0 = "model.safetensors", "global_step/rank_0.pt"


def make_checkpoint(output: Path, step: int, eval_loss: float | None = 1.0, complete: bool = True) -> Path:
    """Writes checkpoint-<step> with three small files, one of them in a subfolder."""
    folder = output / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    for name in (MODEL, "trainer_state.json", RANK_0):
        (folder / name).write_bytes(f"{name} of step {step}".encode())
    if complete:
        files = checkpoint.digests(folder, checkpoint.files_of(folder), flush=True)
        checkpoint.write_manifest(folder, eval_loss, ["model.safetensors"], files)
    return folder


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 200, 1.25)
    manifest = read_manifest(folder)
    # printf 'trainer_state.json of step 200' | sha256sum
    assert manifest["files"]["trainer_state.json"] == {
        "size": 30,
        "sha256": "7c06d0981b7db598eec2c6ff79959786a4ca1eb9868a415f5e02e74475d94dd0",
    }
    assert list(manifest["files"]) == [RANK_0, MODEL, "trainer_state.json"]
    assert (manifest["step"], manifest["eval_loss"], manifest["model"]) == (200, 1.25, [MODEL])
    assert problems_of(folder) == []


def flip(file: Path, position: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / MANIFEST_FILE).unlink(), "it was not written to the end"),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), "it was not written to the end"),
        (lambda f: os.truncate(f / RANK_0, 10), f"{RANK_0} has 10 bytes instead of 33"),
        (lambda f: os.truncate(f / MODEL, 0), f"{MODEL} has 0 bytes instead of 29"),
        (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda f: shutil.rmtree(f / "global_step"), f"{RANK_0} is missing"),
        (lambda f: flip(f / RANK_0), f"{RANK_0} has changed since it was written"),
    ],
)
def test_a_damaged_file_is_detected_and_named(
    tmp_path: Path, damage: Callable[[Path], Any], problem: str
) -> None:
    folder = make_checkpoint(tmp_path, 200)
    damage(folder)
    assert problems_of(folder) == [problem]


def test_one_flipped_bit_is_detected_in_every_file_including_the_manifest(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 200, 1.25)
    contents = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for file, content in contents.items():
        for position in range(len(content)):
            flip(file, position)
            if file.name != MANIFEST_FILE:
                assert problems_of(folder), f"{file.name}, byte {position}"
            elif read_manifest(folder) is not None:  # only whitespace changed
                assert json.loads(file.read_text()) == json.loads(content), f"byte {position}"
            file.write_bytes(content)
    assert not problems_of(folder)


def test_a_checkpoint_renamed_to_another_step_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 200).rename(tmp_path / "checkpoint-300")
    assert problems_of(tmp_path / "checkpoint-300") == ["it was not written to the end"]


def test_some_files_can_be_checked_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 200)
    flip(folder / "trainer_state.json")
    assert problems_of(folder, [MODEL]) == []
    flip(folder / "model.safetensors")
    assert problems_of(folder, [MODEL]) == ["model.safetensors has changed since it was written"]


def test_a_manifest_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, 200, complete=False)
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write_manifest(folder, 1.0, [], {})
    assert problems_of(folder) == ["it was not written to the end"]
    assert MANIFEST_FILE not in "".join(checkpoint.files_of(folder))


def test_checkpoints_are_sorted_by_step_and_other_names_are_ignored(tmp_path: Path) -> None:
    for step in (1000, 9, 200):
        make_checkpoint(tmp_path, step, complete=step != 9)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-5.old", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in (9, 200, 1000)]


def test_the_best_checkpoint_has_the_lowest_held_out_loss_and_is_the_newest_if_equal(tmp_path: Path) -> None:
    assert best(tmp_path) is None
    for step, loss in {1: 2.0, 2: 1.0, 3: 1.0, 4: None, 5: float("nan"), 6: float("inf"), 7: 3.0}.items():
        make_checkpoint(tmp_path, step, loss)
    make_checkpoint(tmp_path, 8, 0.5, complete=False)
    assert best(tmp_path).name == "checkpoint-3"


@settings(deadline=None, max_examples=60)
@given(
    saves=st.lists(
        st.tuples(st.sampled_from([None, 1.0, 1.5, 2.0, float("nan")]), st.booleans()), min_size=1, max_size=8
    ),
    limit=st.integers(1, 4),
)
def test_rotation_keeps_the_newest_complete_and_the_best_checkpoint_and_drops_incomplete_ones(
    saves: list[tuple[float | None, bool]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder_name:
        output, lowest = Path(folder_name), None
        for step, (loss, complete) in enumerate(saves, start=1):
            folder = make_checkpoint(output, step, loss, complete)
            if not complete:
                continue
            rotate(output, limit)
            # Tracked here over all saves, as rotation must never remove the best one.
            if loss is not None and loss == loss and (lowest is None or loss <= lowest[0]):
                lowest = loss, folder
            existing = checkpoints(output)
            assert folder in existing
            assert lowest is None or lowest[1] in existing
            assert all(read_manifest(kept) for kept in existing), "incomplete ones are removed"
            assert len(existing) <= max(limit, 2)


@pytest.mark.parametrize(
    "complete", [[True, False], [False]], ids=["incomplete one is newest", "no complete one"]
)
def test_the_incomplete_checkpoint_being_written_is_kept(tmp_path: Path, complete: list[bool]) -> None:
    folders = [make_checkpoint(tmp_path, step, complete=flag) for step, flag in enumerate(complete)]
    rotate(tmp_path, 1)
    assert checkpoints(tmp_path) == folders


def test_an_interrupted_removal_leaves_no_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    checkpoint.remove(folder)
    assert problems_of(folder) == ["it was not written to the end"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop("files"),
        lambda entries: entries.pop("step"),
        lambda entries: entries.pop("model"),
        lambda entries: entries.pop("eval_loss"),
        lambda entries: entries.update(files=[RANK_0]),
        lambda entries: entries.update(files={RANK_0: 33}),
        lambda entries: entries["files"][RANK_0].update(size="33"),
        lambda entries: entries.update(model=MODEL),
        lambda entries: entries.update(model=["unknown.safetensors"]),
        lambda entries: entries.update(eval_loss="1.0"),
    ],
)
def test_a_manifest_with_other_entries_counts_as_incomplete(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = make_checkpoint(tmp_path, 200)
    manifest = read_manifest(folder)
    change(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(checkpoint.sealed(manifest)))
    assert problems_of(folder) == ["it was not written to the end"]
    assert best(tmp_path) is None


def test_a_manifest_of_too_many_brackets_counts_as_incomplete(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 200)
    (folder / MANIFEST_FILE).write_text("[" * 200_000)
    assert problems_of(folder) == ["it was not written to the end"]


def test_removal_copes_with_files_and_links_in_the_place_of_folders(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").touch()
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "nowhere")
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 3)
    (tmp_path / "checkpoint-3").symlink_to(elsewhere)
    (tmp_path / "checkpoint-4" / MANIFEST_FILE / "below").mkdir(parents=True)
    for step in (1, 2, 3, 4, 5):
        checkpoint.remove(tmp_path / f"checkpoint-{step}")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert problems_of(elsewhere) == [], "what a link points to is kept"


def test_rotation_removes_a_checkpoint_whose_manifest_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1" / MANIFEST_FILE).mkdir(parents=True)
    newest = make_checkpoint(tmp_path, 2)
    rotate(tmp_path, 1)
    assert checkpoints(tmp_path) == [newest]
