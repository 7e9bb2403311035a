"""One command makes the finished model from any checkpoint of any run, and says what to type if it cannot."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

from tests.storage.test_checkpoint import flip, make_checkpoint
from training import export as command
from training.errors import ModelError, UnfinishedRunError
from training.files import fill_folder
from training.model.generation import generate_response, load_model_tokenizer_for_generate
from training.model.loading import load_config
from training.options.trainer_options import TrainingOptions
from training.run import exporting
from training.storage import checkpoint
from training.storage.copy import publish
from training.storage.record import finished_run
from training.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without DeepSpeed, with checkpoints of steps 2 and 3."""
    output = tmp_path_factory.mktemp("finished") / "out"
    train(
        TrainingOptions(
            input_model="demo", training_dataset="demo", test_size=8, per_device_train_batch_size=2, lr=1e-3,
            max_steps=3, save_steps=2, max_shard_size="2MB", local_output_dir=str(output),
        )
    )  # fmt: skip
    return output


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The folder of that run, as if it had been stopped after its last checkpoint."""
    output = tmp_path / "a run"
    output.mkdir()
    for folder in checkpoint.checkpoints(finished):
        shutil.copytree(folder, output / folder.name)
    for name in ("ledger.json", "metrics.jsonl"):
        shutil.copy(finished / name, output)
    record = json.loads((finished / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    return output


def export(folder: Path, target: Path) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner().invoke(command.main, ["--checkpoint", str(folder), "--to", str(target)])
    return result.exit_code, result.output


def test_the_exported_model_is_the_finished_one_answers_and_is_published(
    stopped: Path, finished: Path, tmp_path: Path
) -> None:
    code, output = export(stopped / "checkpoint-3", tmp_path / "to" / "model")
    assert code == 0, output
    folder = tmp_path / "to" / "model"
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in finished.iterdir() if file.is_file() and file.name != "metrics.jsonl"
    }
    ours, theirs = (finished_run(place) for place in (folder, finished))
    assert ours["weights"] == theirs["weights"]
    assert len(ours["weights"]) == 2
    for name in (*ours["weights"], "config.json", "tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    different = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    assert different == {"exported_from"}
    assert (folder / "README.md").read_text().count("# model\n") == 1
    model, tokenizer = load_model_tokenizer_for_generate(str(folder), device="cpu")
    assert isinstance(generate_response("Say red.", model=model, tokenizer=tokenizer, max_new_tokens=3), str)
    assert "run.json" in publish(folder, str(tmp_path / "published"))


def test_the_model_of_an_earlier_step_says_so(stopped: Path, tmp_path: Path) -> None:
    code, output = export(stopped / "checkpoint-2", tmp_path / "model")
    assert code == 0, output
    record = finished_run(tmp_path / "model")
    assert (record["steps"], record["model_of_step"]) == (2, 2)
    assert record["exported_from"] == str(stopped / "checkpoint-2")
    assert "after\n2 steps on 1 device" in (tmp_path / "model" / "README.md").read_text()


def test_a_checkpoint_without_a_held_out_loss_and_one_without_its_run_are_exported(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped / "checkpoint-2"
    manifest = checkpoint.read_manifest(folder)
    checkpoint.write_manifest(folder, None, manifest["model"], manifest["files"])
    assert export(folder, tmp_path / "unmeasured")[0] == 0
    assert "not measured after" in (tmp_path / "unmeasured" / "README.md").read_text()
    alone = Path(shutil.copytree(folder, tmp_path / "copy" / folder.name))
    assert export(alone, tmp_path / "alone")[0] == 0
    assert "has no record of the run: the model has no card and no run.json" in caplog.text
    load_model_tokenizer_for_generate(str(tmp_path / "alone"), device="cpu")


def incomplete(output: Path, target: Path) -> Path:
    (output / "checkpoint-3" / "manifest.json").unlink()
    return output / "checkpoint-3"


def damaged(output: Path, target: Path) -> Path:
    flip(output / "checkpoint-3" / "trainer_state.json")
    return output / "checkpoint-3"


def not_empty(output: Path, target: Path) -> Path:
    target.mkdir()
    (target / "notes.txt").touch()
    return output / "checkpoint-3"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda output, target: output, "is the folder of a run, not a checkpoint. Type --checkpoint 'RUN/checkpoint-3'"),
        (lambda output, target: output / "checkpoint-3" / "runs", "no such folder"),
        (lambda output, target: output.parent, "is not a checkpoint. Name a folder checkpoint-STEP of a run"),
        (incomplete, "it was not written to the end. Type --checkpoint 'RUN/checkpoint-2', the newest complete"),
        (damaged, "trainer_state.json has changed since it was written. Type --checkpoint 'RUN/checkpoint-2'"),
        (not_empty, "is not empty. Name a new folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_with_what_to_type(
    stopped: Path, tmp_path: Path, change: Callable[[Path, Path], Path], words: str
) -> None:
    target = tmp_path / "model"
    folder = change(stopped, target)
    before = sorted(tmp_path.rglob("*"))
    code, output = export(folder, target)
    assert code == 2
    assert "Traceback" not in output
    assert words.replace("RUN", str(stopped)) in re.sub(r"\s+", " ", output)
    assert sorted(tmp_path.rglob("*")) == before


def test_both_folders_are_reported_at_once(stopped: Path, tmp_path: Path) -> None:
    code, output = export(stopped, stopped)
    assert code == 2
    assert "is the folder of a run" in output
    assert "is not empty" in output


def test_a_full_disk_leaves_no_folder(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "free_bytes", lambda path: 1000)
    code, output = export(stopped / "checkpoint-3", tmp_path / "model")
    assert code == 2
    assert re.search(r"the model needs [\d.]+ MiB, and 0.0 MiB are free. Make room", output)
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    code, output = export(stopped / "checkpoint-3", tmp_path / "model")
    assert code == 2
    assert "could not be written (OSError: [Errno 28] No space left on device). Make room" in output
    assert [path.name for path in tmp_path.iterdir()] == ["a run"]


def test_an_unfinished_run_names_the_command_with_its_newest_complete_checkpoint(
    stopped: Path, tmp_path: Path
) -> None:
    words = f"python -m training.export --checkpoint '{stopped}/checkpoint-3' --to FOLDER"
    for refuse in (
        lambda: load_model_tokenizer_for_generate(str(stopped), device="cpu"),
        lambda: publish(stopped, str(tmp_path / "published")),
    ):
        with pytest.raises(UnfinishedRunError) as error:
            refuse()
        assert "with --resume auto. To use the model of checkpoint-3, type" in str(error.value)
        assert str(error.value).endswith(words)
    checkpoint.remove(stopped / "checkpoint-3")
    checkpoint.remove(stopped / "checkpoint-2")
    with pytest.raises(UnfinishedRunError, match=r"with --resume auto\.$"):
        finished_run(stopped)


def test_a_checkpoint_of_shards_is_not_taken_for_a_model(stopped: Path) -> None:
    folder = stopped / "checkpoint-3"
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    for file in folder.glob("*.safetensors*"):
        os.unlink(file)
    for load in (load_config, lambda name: load_model_tokenizer_for_generate(name, device="cpu")):
        with pytest.raises(
            ModelError, match=r"it is a checkpoint, .* python -m training.export --checkpoint"
        ):
            load(str(folder))


# --- targets and damaged runs; the weights are not the point here ------------------------------------


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete checkpoint of small files, whose model is written and verified without torch."""
    folder = make_checkpoint(tmp_path / "run", 15)
    monkeypatch.setattr(exporting, "verify_model", lambda *_: None)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_empty_folder_is_filled_where_it_is(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point and the current folder of a shell cannot be replaced by another folder."""
    empty = [tmp_path / "mounted", tmp_path / "linked", tmp_path / "current"]
    for folder in empty:
        folder.mkdir()
    inodes = [folder.stat().st_ino for folder in empty]
    (tmp_path / "link").symlink_to(empty[1])
    monkeypatch.chdir(empty[2])
    for target in (empty[0], tmp_path / "link", Path(".")):
        code, output = export(plain, target)
        assert code == 0, output
    assert [names_in(folder) for folder in empty] == [["model.safetensors"]] * 3
    assert [folder.stat().st_ino for folder in empty] == inodes


@pytest.mark.parametrize("exists", [True, False])
def test_a_target_that_was_filled_meanwhile_is_kept_and_reported(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    target = tmp_path / "model"
    if exists:
        target.mkdir()

    def fill(*_: object) -> None:
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("theirs")

    monkeypatch.setattr(exporting, "verify_model", fill)
    code, output = export(plain, target)
    assert code == 2, output
    assert "something else was written there meanwhile, and is kept. Name a new folder" in output
    assert names_in(target) == ["notes.txt"]
    assert (target / "notes.txt").read_text() == "theirs"
    assert names_in(tmp_path) == ["model", "run"]


def test_the_last_file_is_moved_after_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda file, to: (moved.append(Path(to).name), real(file, to)))
    with fill_folder(tmp_path, last="b") as partial:
        for name in "bac":
            (partial / name).touch()
    assert moved[-1] == "b"
    assert names_in(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ledger.json", "{"),
        ("run.json", '{"options": {}, "status": "running"}'),
        ("metrics.jsonl", '{"step": 2, "blocked_seconds": 0.1}\n'),
    ],
)
def test_a_damaged_run_costs_the_card_but_not_the_model(
    tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture, name: str, content: str
) -> None:
    run = plain.parent
    losses = {"log_history": [{"step": 0, "eval_loss": 2.0}]}
    (plain / "trainer_state.json").write_text(json.dumps(losses))
    progress = {"loss_total": 1.0, "loss_sums": [1.0], "seconds": 1.0, "batching": "packed"}
    (plain / "progress.json").write_text(json.dumps(progress))
    checkpoint.write_manifest(
        plain, 1.0, ["model.safetensors"], checkpoint.digests(plain, checkpoint.files_of(plain))
    )
    options = {"input_model": "demo", "training_dataset": "demo"}
    record = {"options": options, "status": "running", "world_size": 1, "precision": "bf16"}
    (run / "run.json").write_text(json.dumps(record))
    (run / "ledger.json").write_text(json.dumps({"source": "demo", "max_length": 8}))
    code, output = export(plain, tmp_path / "whole")
    assert code == 0, output
    assert "run.json" in names_in(tmp_path / "whole"), "the card is written if nothing is damaged"
    (run / name).write_text(content)
    code, output = export(plain, tmp_path / "model")
    assert code == 0, output
    assert f"the files of the run in {run} cannot be used (" in caplog.text
    assert names_in(tmp_path / "model") == ["model.safetensors"]


@pytest.mark.parametrize("function", ["digests", "files_of", "copy_files"])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_reported_with_another_one(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    newer = make_checkpoint(plain.parent, 20)
    module = exporting if function == "copy_files" else checkpoint
    real = getattr(module, function)

    def removed_first(*args: object, **kwargs: object) -> object:
        checkpoint.remove(plain)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, removed_first)
    code, output = export(plain, tmp_path / "model")
    assert code == 2, output
    assert f"it was removed meanwhile. Type --checkpoint {newer}, the newest" in re.sub(r"\s+", " ", output)
    assert not (tmp_path / "model").exists()


def test_only_a_full_disk_asks_for_room(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, room in (
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
    ):
        monkeypatch.setattr(exporting, "verify_model", Mock(side_effect=error))
        code, output = export(plain, tmp_path / "model")
        assert code == 2, output
        assert ("Make room" in output) is room, output


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-15/model", "checkpoint-16/model", "copy/model"])
def test_a_target_that_a_run_would_remove_is_refused(plain: Path, name: str) -> None:
    run = plain.parent
    (run / "copy").mkdir()
    (run / "copy" / "manifest.json").touch()
    code, output = export(plain, run / name)
    assert code == 2, output
    removed = run / name.removesuffix("/model")
    assert f"a run may remove {removed} as its checkpoint. Name a folder outside of it" in output
    assert names_in(run) == ["checkpoint-15", "copy"]


def test_only_the_folder_that_is_wrong_is_reported(tmp_path: Path) -> None:
    code, output = export(tmp_path, tmp_path / "x")
    assert code == 2
    assert "is not a checkpoint" in output
    assert "--to" not in output


def test_an_unusable_model_is_reported_by_the_name_that_was_typed(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, *_: object) -> None:
        raise ModelError(f"{folder} is not a usable model:\n  - wte holds NaN")

    monkeypatch.setattr(exporting, "verify_model", refuse)
    code, output = export(plain, tmp_path / "model")
    assert code == 2
    assert f"{tmp_path / 'model'} is not a usable model" in output
    assert ".partial" not in output
