"""A save in the background holds the state of its step, and no failed write stays unseen."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from training.consts import METRICS_FILE
from training.options.trainer_options import TrainingOptions
from training.run import background
from training.run.background import FAILED, NO_SAVE, WRITING, WRITTEN, HostCopies, Writer
from training.storage import metrics
from training.trainer import train


def a_state() -> dict[str, Any]:
    """Shared storages, views, a parameter, an empty tensor, a tensor with an attribute, plain objects."""
    flat = torch.arange(24, dtype=torch.float32)
    master = torch.randn(6, requires_grad=True)
    vars(master)["ds_id"] = "3"
    moments = {"exp_avg": torch.randn(6), "step": torch.tensor(7.0)}
    return {
        "views": [flat[2:8], flat[4:20].view(4, 4).t()],
        "again": (flat, {"weight": torch.nn.Parameter(torch.randn(3, 2).bfloat16())}),
        "empty": torch.empty(0),
        "master": master,
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
    }


def as_written(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def change(state: dict[str, Any]) -> None:
    """What the next step does to a state."""
    with torch.no_grad():
        for tensor in background._tensors(state):
            tensor.add_(1)
    state["optimizer"]["param_groups"][0]["lr"] = 5.0


def test_a_copy_is_written_as_its_original_and_keeps_its_numbers_when_the_original_changes():
    state = a_state()
    written = as_written(state)
    copied = HostCopies().copy(state)
    change(state)
    assert as_written(copied) == written
    assert as_written(state) != written


def test_a_compact_copy_is_written_without_the_numbers_around_it():
    flat = torch.arange(1000.0)
    copied = HostCopies().copy({"weight": flat[10:14].view(2, 2), "bias": flat[20:22]}, compact=True)
    assert [tensor.untyped_storage().nbytes() for tensor in copied.values()] == [16, 8]
    assert torch.equal(copied["weight"], flat[10:14].view(2, 2))


def test_host_memory_is_allocated_once_for_all_saves(monkeypatch):
    copies, state = HostCopies(), a_state()
    copies.copy(state)
    places = [buffer.data_ptr() for buffer in copies.buffers]
    monkeypatch.setattr(background, "_host_memory", lambda size: pytest.fail("allocated again"))
    copies.begin()
    change(state)
    assert as_written(copies.copy(state)) == as_written(state)
    assert [buffer.data_ptr() for buffer in copies.buffers] == places


def test_safetensors_are_written_as_the_library_writes_them(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4).bfloat16(),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "scalar": torch.tensor(3),
        "a.bias é": torch.randn(6, 2).t()[:, 1:],
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = background.write_hashed(
        tmp_path / "m.safetensors", lambda s: background.write_safetensors(s, tensors, {"format": "pt"})
    )
    expected = save(tensors, {"format": "pt"})
    assert (tmp_path / "m.safetensors").read_bytes() == expected
    assert digest == {"size": len(expected), "sha256": hashlib.sha256(expected).hexdigest()}


@pytest.fixture
def slow(monkeypatch) -> threading.Event:
    """Writing waits until this is set."""
    go, real = threading.Event(), background.write_hashed

    def write(*args: Any) -> Any:
        assert go.wait(20)
        return real(*args)

    monkeypatch.setattr(background, "write_hashed", write)
    return go


def begin(folder: Path, *states: Any) -> Writer:
    writer = Writer(background=True)
    writer.begin(folder)
    for number, state in enumerate(states):
        writer.save(state, folder / f"{number}.pt")
    writer.start()
    return writer


def test_a_save_holds_its_own_step_and_its_digests_are_those_of_the_files(tmp_path, slow):
    state = a_state()
    before = copy.deepcopy(state)
    writer = begin(tmp_path, state, {"more": 1})
    change(state)
    assert writer.status == WRITING
    slow.set()
    writer.join()
    assert writer.status == WRITTEN
    written = writer.take()
    assert writer.status == NO_SAVE
    assert list(written.files) == ["0.pt", "1.pt"]
    for name, digest in written.files.items():
        content = (tmp_path / name).read_bytes()
        assert digest == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert as_written(torch.load(tmp_path / "0.pt", weights_only=False)) == as_written(before)


def test_without_host_memory_for_copies_files_are_written_at_once(tmp_path):
    writer, state = Writer(background=False), a_state()
    writer.begin(tmp_path)
    writer.save(state, tmp_path / "0.pt")
    writer.save_weights({"w": torch.ones(3)}, tmp_path / "m.safetensors", {})
    assert torch.load(tmp_path / "0.pt", weights_only=False).keys() == state.keys()
    assert not writer.copies.buffers
    writer.start()
    writer.join()
    assert list(writer.take().files) == ["0.pt", "m.safetensors"]


class FullDisk(io.BytesIO):
    """Takes a thousand bytes."""

    def write(self, block: Any) -> int:
        if self.tell() > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


class Unpicklable:
    """Can be copied, but not written."""

    def __deepcopy__(self, memo: Any) -> Unpicklable:
        return self

    def __reduce__(self) -> Any:
        raise ValueError("cannot be pickled")


class Dying:
    def __deepcopy__(self, memo: Any) -> Dying:
        return self

    def __reduce__(self) -> Any:
        raise SystemExit  # ends a thread without a word


@pytest.mark.parametrize(
    ("state", "opened", "problem", "full"),
    [
        (torch.randn(5000), FullDisk, "[Errno 28] No space left on device", True),
        ({"a": torch.randn(3), "b": Unpicklable()}, None, "ValueError: cannot be pickled", False),
        (Dying(), None, "SystemExit", False),
    ],
    ids=["full disk", "a pickle that fails", "a thread that dies"],
)
def test_a_failed_write_is_reported_with_its_reason(tmp_path, monkeypatch, state, opened, problem, full):
    if opened:
        monkeypatch.setattr(background, "open", lambda *_: opened(), raising=False)
    writer = begin(tmp_path, state, {"never": "written"})
    writer.join()
    assert writer.status == FAILED
    written = writer.take()
    assert (written.problem, written.full) == (problem, full)
    assert not written.files
    assert not (tmp_path / "1.pt").exists()


def test_a_thread_that_ends_without_a_word_is_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "_run", lambda self: None)
    writer = begin(tmp_path, 1)
    writer.join()
    assert writer.status == FAILED
    assert writer.take().problem == "the thread that wrote it ended without a word"


def test_a_step_whose_end_completes_a_save_is_logged_like_any_other(tmp_path, rows):
    options = {"input_model": "demo", "training_dataset": rows, "max_steps": 8, "test_size": 8}
    train(TrainingOptions(local_output_dir=str(tmp_path / "out"), save_steps=2, logging_steps=1, **options))
    entries = metrics.read(tmp_path / "out" / METRICS_FILE)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 9))
    assert [entry["step"] for entry in entries if "blocked_seconds" in entry] == [2, 4, 6, 8]
