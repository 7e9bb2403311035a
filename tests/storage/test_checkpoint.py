"""A checkpoint is whole or not there: what is torn is named, and rotation leaves what is still needed."""

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


def a_checkpoint(output: Path, step: int, eval_loss: float | None = 1.0, whole: bool = True) -> Path:
    """checkpoint-<step> with three small files, one in a folder."""
    folder = output / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    for name in (MODEL, "trainer_state.json", RANK_0):
        (folder / name).write_bytes(f"{name} of step {step}".encode())
    if whole:
        files = checkpoint.digests(folder, checkpoint.files_of(folder), written_now=True)
        checkpoint.write_manifest(folder, eval_loss, ["model.safetensors"], files)
    return folder


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 200, 1.25)
    manifest = read_manifest(folder)
    # printf 'trainer_state.json of step 200' | sha256sum
    assert manifest["files"]["trainer_state.json"] == {
        "size": 30,
        "sha256": "7c06d0981b7db598eec2c6ff79959786a4ca1eb9868a415f5e02e74475d94dd0",
    }
    assert list(manifest["files"]) == [RANK_0, MODEL, "trainer_state.json"]
    assert (manifest["step"], manifest["eval_loss"], manifest["model"]) == (200, 1.25, [MODEL])
    assert problems_of(folder) == []


def flip(file: Path, place: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
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
def test_what_is_torn_is_recognised_and_named(
    tmp_path: Path, damage: Callable[[Path], Any], fault: str
) -> None:
    folder = a_checkpoint(tmp_path, 200)
    damage(folder)
    assert problems_of(folder) == [fault]


def test_every_single_bit_of_a_checkpoint_counts_those_of_the_manifest_as_well(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 200, 1.25)
    whole = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for file, content in whole.items():
        for place in range(len(content)):
            flip(file, place)
            if file.name != MANIFEST_FILE:
                assert problems_of(folder), f"{file.name}, byte {place}"
            elif read_manifest(folder) is not None:  # a space or a line end
                assert json.loads(file.read_text()) == json.loads(content), f"byte {place}"
            file.write_bytes(content)
    assert not problems_of(folder)


def test_a_checkpoint_under_the_name_of_another_step_is_none(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 200).rename(tmp_path / "checkpoint-300")
    assert problems_of(tmp_path / "checkpoint-300") == ["it was not written to the end"]


def test_the_model_alone_can_be_asked(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 200)
    flip(folder / "trainer_state.json")
    assert problems_of(folder, model_only=True) == []
    flip(folder / "model.safetensors")
    assert problems_of(folder, model_only=True) == ["model.safetensors has changed since it was written"]


def test_a_manifest_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_checkpoint(tmp_path, 200, whole=False)
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write_manifest(folder, 1.0, [], {})
    assert problems_of(folder) == ["it was not written to the end"]
    assert MANIFEST_FILE not in "".join(checkpoint.files_of(folder))


def test_checkpoints_are_found_by_step_and_nothing_else_is_one(tmp_path: Path) -> None:
    for step in (1000, 9, 200):
        a_checkpoint(tmp_path, step, whole=step != 9)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-5.old", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in (9, 200, 1000)]


def test_the_best_has_the_least_held_out_loss_and_the_newest_of_equals_counts(tmp_path: Path) -> None:
    assert best(tmp_path) is None
    for step, loss in {1: 2.0, 2: 1.0, 3: 1.0, 4: None, 5: float("nan"), 6: float("inf"), 7: 3.0}.items():
        a_checkpoint(tmp_path, step, loss)
    a_checkpoint(tmp_path, 8, 0.5, whole=False)
    assert best(tmp_path).name == "checkpoint-3"


@settings(deadline=None, max_examples=60)
@given(
    saves=st.lists(
        st.tuples(st.sampled_from([None, 1.0, 1.5, 2.0, float("nan")]), st.booleans()), min_size=1, max_size=8
    ),
    limit=st.integers(1, 4),
)
def test_rotation_keeps_the_newest_whole_one_and_the_best_and_no_torn_one_before_them(
    saves: list[tuple[float | None, bool]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        output, least = Path(place), None
        for step, (loss, whole) in enumerate(saves, start=1):
            folder = a_checkpoint(output, step, loss, whole)
            if not whole:
                continue
            rotate(output, limit)
            # A run of its own account: the best of all so far, as losses of removed ones count no less.
            if loss is not None and loss == loss and (least is None or loss <= least[0]):
                least = loss, folder
            there = checkpoints(output)
            assert folder in there
            assert least is None or least[1] in there
            assert all(read_manifest(each) for each in there), "torn ones are gone"
            assert len(there) <= max(limit, 2)


@pytest.mark.parametrize("whole", [[True, False], [False]], ids=["the torn one is newer", "nothing is whole"])
def test_a_torn_checkpoint_is_left_to_the_run_that_writes_it(tmp_path: Path, whole: list[bool]) -> None:
    folders = [a_checkpoint(tmp_path, step, whole=each) for step, each in enumerate(whole)]
    rotate(tmp_path, 1)
    assert checkpoints(tmp_path) == folders


def test_a_removal_that_is_killed_leaves_no_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_checkpoint(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    checkpoint.remove(folder)
    assert problems_of(folder) == ["it was not written to the end"]
