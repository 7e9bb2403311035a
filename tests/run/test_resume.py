"""--resume: which checkpoint it selects, what it refuses, and that the resumed run is the same run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.conftest import resolved
from tests.run.test_kills import assert_the_same_run, contents, history
from tests.storage.test_checkpoint import flip
from training.data import ledger
from training.data.batching import GlobalBatchSampler
from training.errors import Interrupted, OptionsError, TrainingError
from training.files import WRITER_FILES, write_json
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.run import prepare, steps
from training.run.completion_trainer import CompletionTrainer
from training.run.failures import StopRequest
from training.run.identity import new_record
from training.run.resume import apply_rates
from training.run.start import Start, find_start
from training.run.step_guard import StepGuard
from training.run.steps import planned_steps
from training.storage import checkpoint
from training.storage.record import write_run_record
from training.trainer import train

STEPS = 12


def options_of(output: Path, **changed: Any) -> TrainingOptions:
    return TrainingOptions(
        **{"local_output_dir": str(output), "input_model": "demo", "resume": "auto", "bf16": False} | changed
    )


def make_run(output: Path, *steps: int, status: str = "running", **record: Any) -> None:
    """Creates the folder of a run with complete checkpoints at these steps."""
    output.mkdir(exist_ok=True)
    for step in steps:
        folder = output / f"checkpoint-{step}"
        folder.mkdir()
        write_json(folder / checkpoint.PROGRESS_FILE, {"loss_sums": [0.5]})
        (folder / "optimizer.pt").write_bytes(b"moments")
        files = checkpoint.digests(folder, checkpoint.files_of(folder))
        checkpoint.write_manifest(folder, 1.0, [], files)
    write_run_record(output, new_record(resolved(options_of(output)), "rows") | {"status": status} | record)


def start_of(output: Path, steps: int = STEPS, **changed: Any) -> Start:
    options = options_of(output, **changed)
    return find_start(output, options, new_record(resolved(options), "rows"), steps)


def refusal(output: Path, steps: int = STEPS, **changed: Any) -> str:
    with pytest.raises(OptionsError) as error:
        start_of(output, steps, **changed)
    return str(error.value)


def set_eval_loss(folder: Path, eval_loss: float | None) -> None:
    """Changes the held-out loss of a checkpoint."""
    manifest = checkpoint.read_manifest(folder)
    checkpoint.write_manifest(folder, eval_loss, manifest["model"], manifest["files"])


# --- which checkpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [[], ["notes.txt"]])
def test_auto_starts_at_step_0_in_a_folder_without_a_run(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("of somebody else")
    assert start_of(tmp_path) == Start()


@pytest.mark.parametrize("record", ["", "{{{", "{}", '{"options": {}}', None])
def test_a_run_without_a_readable_record_is_refused_and_its_files_are_kept(
    tmp_path: Path, record: str | None
) -> None:
    make_run(tmp_path / "out", 3, 6)
    file = tmp_path / "out" / "run.json"
    file.unlink() if record is None else file.write_text(record)
    before = contents(tmp_path)
    assert "run.json cannot be read, so the run is unknown" in refusal(tmp_path / "out")
    assert contents(tmp_path) == before


def test_auto_selects_the_newest_complete_checkpoint_and_never_selects_none(
    tmp_path: Path,
) -> None:
    make_run(tmp_path / "out", 3, 6)
    start = start_of(tmp_path / "out")
    assert (start.folder, start.step, start.saved_ranks) == (tmp_path / "out" / "checkpoint-6", 6, 1)
    assert not start.finished
    assert start_of(tmp_path / "out", resume="never") == Start()


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0_with_any_options(tmp_path: Path) -> None:
    make_run(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-3").mkdir()
    assert start_of(tmp_path / "out", seed=1) == Start()


def test_incomplete_and_damaged_checkpoints_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    make_run(output, 3, 6, 9, 12)
    (output / "checkpoint-12" / checkpoint.MANIFEST_FILE).unlink()
    (output / "checkpoint-9" / "optimizer.pt").write_bytes(b"momentS")
    before = contents(output)
    assert start_of(output).folder == output / "checkpoint-6"
    assert f"{output}/checkpoint-12 is skipped: it was not written to the end" in caplog.text
    assert f"{output}/checkpoint-9 is skipped: optimizer.pt has changed since it was written" in caplog.text
    assert contents(output) == before, "the search changes no file"


def test_if_all_checkpoints_are_damaged_the_run_is_refused(tmp_path: Path) -> None:
    """A damaged manifest counts as damage, not as an incomplete checkpoint."""
    make_run(tmp_path / "out", 3)
    file = tmp_path / "out" / "checkpoint-3" / checkpoint.MANIFEST_FILE
    file.write_text(file.read_text().replace("1.0", "2.0"))
    assert "checkpoint-3: manifest.json has changed since it was written" in refusal(tmp_path / "out")
    make_run(tmp_path / "out", 6, 9)
    for step, name in ((6, "optimizer.pt"), (9, "progress.json")):
        os.truncate(tmp_path / "out" / f"checkpoint-{step}" / name, 2)
    message = refusal(tmp_path / "out")
    assert re.search(r"every checkpoint in .* is damaged \(checkpoint-9: progress.json has 2", message)
    assert "checkpoint-6: optimizer.pt has 2 bytes instead of 7" in message


def test_changed_options_are_refused_with_a_list_and_force_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "out", 3)
    message = refusal(tmp_path / "out", seed=1, lr=1.0)
    assert "--seed was 42, but is now 1" in message
    assert "--lr was 1e-05, but is now 1.0" in message
    assert "--force continues with the new values" in message
    assert start_of(tmp_path / "out", seed=1, force=True).step == 3
    assert "--force: continuing although --seed was 42, but is now 1" in caplog.text


def test_a_finished_run_needs_no_checkpoints_unless_it_trains_longer(tmp_path: Path) -> None:
    """Or chooses another final model."""
    make_run(tmp_path / "out", 12, status="finished", steps=12)
    assert start_of(tmp_path / "out").finished
    assert start_of(tmp_path / "out", steps=20).step == 12
    assert not start_of(tmp_path / "out", final_model="best").finished
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    assert start_of(tmp_path / "out").finished
    for changed in ({"steps": 20}, {"final_model": "best"}):
        message = refusal(tmp_path / "out", **changed)
        assert "a finished model of 12 steps, but no checkpoint to continue from" in message


def test_a_run_cannot_end_before_its_checkpoint_or_without_a_held_out_loss(tmp_path: Path) -> None:
    make_run(tmp_path / "out", 3, 6)
    assert start_of(tmp_path / "out", steps=6).step == 6
    message = refusal(tmp_path / "out", steps=5)
    assert "is at step 6, and the run would end at 5" in message
    assert "to end at 6 or later" in message
    set_eval_loss(tmp_path / "out" / "checkpoint-6", None)
    assert start_of(tmp_path / "out", steps=7).step == 6
    assert "to end at 7 or later" in refusal(tmp_path / "out", steps=6)


def test_a_deepspeed_checkpoint_is_not_loaded_without_deepspeed(tmp_path: Path) -> None:
    make_run(tmp_path / "out", 6)
    (tmp_path / "out" / "checkpoint-6" / "global_step6").mkdir()
    assert "was written with DeepSpeed. Add --deepspeed" in refusal(tmp_path / "out")


# --- --resume FOLDER ---------------------------------------------------------------------------------


def test_a_named_checkpoint_starts_a_new_folder_or_continues_its_own_as_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path / "out", 3, 6)
    named = tmp_path / "out" / "checkpoint-6"
    assert start_of(tmp_path / "out", resume=str(named)).folder == named
    assert start_of(tmp_path / "new", resume=str(tmp_path / "out" / "checkpoint-3")).step == 3
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("resume", "output", "words"),
    [
        ("out/checkpoint-3", "out", "has newer checkpoints (checkpoint-6), which the run would overwrite"),
        ("out/checkpoint-6", "other", "already holds another run. Type --resume auto to continue that one"),
        ("out", "out", "it is not a checkpoint. Type --resume auto"),
        ("out/runs", "out", "it is not a checkpoint. Type --resume auto"),
        ("out/checkpoint-7", "out", "it was not written to the end"),
        ("checkpoint-2", "new", "there is no run.json beside it"),
    ],
)
def test_an_unusable_checkpoint_name_is_refused_with_what_to_type(
    tmp_path: Path, resume: str, output: str, words: str
) -> None:
    make_run(tmp_path / "out", 3, 6)
    make_run(tmp_path / "other", 9)
    for name in ("out/runs", "out/checkpoint-7", "x"):
        (tmp_path / name).mkdir()
    if output != "out" or resume == "out/checkpoint-3":
        (tmp_path / "out" / "checkpoint-7").rmdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "checkpoint-2")
    manifest = checkpoint.read_manifest(tmp_path / "out" / "checkpoint-3")
    checkpoint.write_manifest(tmp_path / "checkpoint-2", 1.0, [], manifest["files"])
    assert words in refusal(tmp_path / output, resume=str(tmp_path / resume))


def test_a_run_from_another_runs_checkpoint_resumes_there_until_it_has_its_own(tmp_path: Path) -> None:
    """With the command that started it, and with --resume auto."""
    make_run(tmp_path / "out", 3, 6)
    source = tmp_path / "out" / "checkpoint-6"
    make_run(tmp_path / "new", begun_from=str(source), options=asdict(options_of(tmp_path / "new", lr=1.0)))
    (tmp_path / "new" / "checkpoint-9").mkdir()  # incomplete
    for chosen in ("auto", str(source)):
        start = start_of(tmp_path / "new", resume=chosen, lr=1.0, force=True)
        assert (start.folder, start.step) == (source, 6)
    other = str(tmp_path / "out" / "checkpoint-3")
    assert "already holds another run" in refusal(tmp_path / "new", resume=other)
    assert "--lr was 1.0, but is now 1e-05" in refusal(tmp_path / "new"), (
        "the options that --force started with"
    )
    shutil.rmtree(source)
    message = refusal(tmp_path / "new", lr=1.0)
    assert re.search(
        r"has no checkpoint of its own yet, and the one it started from, .*checkpoint-6, cannot be used",
        message,
    )
    make_run(tmp_path / "new", 8, begun_from=str(source))
    assert start_of(tmp_path / "new").step == 8


# --- removal ------------------------------------------------------------------------


def test_only_checkpoints_and_entries_of_later_steps_are_removed(tmp_path: Path) -> None:
    make_run(tmp_path, 3, 6, 9)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "runs").mkdir()
    steps.forget_later_steps(tmp_path, Start(tmp_path / "checkpoint-6"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6", "run.json", "runs"]


def test_the_second_parameter_group_keeps_no_decay() -> None:
    """DeepSpeed's universal load gives the first group's settings to all."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.1} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups)
    apply_rates(LambdaLR(optimizer, lambda step: 1.0), lr=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


# --- the resumed run is the same run ----------------------------------------------------------------


def run(
    rows: str, output: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None, **changed: Any
) -> tuple[dict[str, Any], list[Any]]:
    """(record, tokens of each micro-step) of a run in this process. `stop_at`: the step stopped as by SIGTERM."""
    request, seen = StopRequest(), []

    class SpiedTrainer(CompletionTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            request.received |= self.state.global_step + 1 == stop_at
            seen.append((self.state.global_step, inputs["input_ids"].tolist()))
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(steps, "CompletionTrainer", SpiedTrainer)
    options = {
        "training_dataset": rows, "test_size": 10, "epochs": 2, "logging_steps": 2, "eval_steps": 4, "save_steps": 3,
        "lr": 1e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    return train(options_of(output, **options | changed), request), seen


TrainFunction = Callable[..., tuple[dict[str, Any], list[Any]]]


@pytest.fixture
def train_small(rows: str, model_with_dropout: str, monkeypatch: pytest.MonkeyPatch) -> TrainFunction:
    """`run` on a model with dropout."""
    return partial(run, rows, monkeypatch=monkeypatch, input_model=model_with_dropout)


@pytest.fixture(scope="module")
def undisturbed(
    rows: str, model_with_dropout: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list]:
    """(folder, tokens of each micro-step) of 16 steps in two epochs, 8 rows a step, fewer in the last step of an epoch."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        record, seen = run(rows, output, patch, input_model=model_with_dropout, save_total_limit=50)
    assert record["steps"] == 16
    return output, seen


@pytest.fixture
def copied(undisturbed: tuple[Path, list], tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed[0], tmp_path / "out"))


# 3: a save between two log lines. 4: a held-out loss is due. 5: neither. 8: the end of an epoch. 12: all of these.
# 15 and 16: the end of the run.
@pytest.mark.parametrize(
    "stops",
    [[3], [5, 6], [8], [16], *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([4], [12], [15]))],
    ids=str,
)
def test_a_stopped_run_resumes_with_the_same_rows_losses_dropout_and_weights(
    train_small: TrainFunction, undisturbed: tuple[Path, list], tmp_path: Path, stops: list[int]
) -> None:
    reference, its_rows = undisturbed
    output, all_seen = tmp_path / "out", []
    for stop_at in stops:
        record, seen = train_small(output, stop_at=stop_at)
        all_seen += seen
        assert record["status"] == "stopped"
        assert json.loads((output / "run.json").read_text())["status"] == "stopped"
        assert checkpoint.checkpoints(output)[-1].name == f"checkpoint-{stop_at}"
    record, seen = train_small(output)
    assert all_seen + seen == its_rows
    assert_the_same_run(output, reference)
    for folder in checkpoint.checkpoints(output):
        theirs = checkpoint.read_manifest(reference / folder.name)
        if theirs is not None:
            assert checkpoint.read_manifest(folder)["eval_loss"] == theirs["eval_loss"]


def test_a_run_of_an_earlier_version_that_recorded_its_dataset_as_a_text_resumes(
    train_small: TrainFunction, rows: str, tmp_path: Path
) -> None:
    output, changed = tmp_path / "out", {"max_steps": 3}
    train_small(output, stop_at=2, **changed)
    former = json.loads((output / "run.json").read_text())
    assert former["options"]["training_dataset"] == [rows]
    write_run_record(output, former | {"options": former["options"] | {"training_dataset": rows}})
    record, _ = train_small(output, **changed)
    assert (record["status"], record["id"], record["rows"]) == ("finished", former["id"], former["rows"])
    assert f"on `{rows}` (licence: unknown)" in (output / "README.md").read_text()


def test_a_finished_run_is_not_changed_and_the_best_model_can_be_chosen_later(
    train_small: TrainFunction, copied: Path
) -> None:
    before = contents(copied)
    record, seen = train_small(copied)
    assert record["status"] == "finished"
    assert not seen
    assert contents(copied) == before
    best = copied / "checkpoint-6"
    set_eval_loss(best, 0.1)
    record, seen = train_small(copied, final_model="best")
    assert not seen
    assert (record["model_of_step"], record["steps"]) == (6, 16)
    assert (copied / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_the_best_checkpoint_survives_resume_and_rotation_and_becomes_the_model(
    train_small: TrainFunction, tmp_path: Path
) -> None:
    output, best = tmp_path / "out", tmp_path / "out" / "checkpoint-3"
    train_small(output, stop_at=5, save_total_limit=1)
    set_eval_loss(best, 0.1)
    record, _ = train_small(output, save_total_limit=1, final_model="best")
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-3", "checkpoint-16"]
    assert (record["model_of_step"], record["steps"]) == (3, 16)
    assert (output / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_a_changed_data_file_is_refused_and_no_file_is_touched(
    train_small: TrainFunction, rows: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, output = Path(shutil.copy(rows, tmp_path)), tmp_path / "out"
    changed = {"training_dataset": str(file), "max_steps": 5}
    train_small(output, stop_at=3, **changed)
    before = contents(output)
    file.write_text(file.read_text().replace("red blue green", "red blue black"))  # of many rows
    with pytest.raises(OptionsError, match=r"the rows differ: .* or the file has changed") as error:
        train_small(output, **changed, seed=7)
    assert "--seed was 42, but is now 7" in str(error.value), "all differences in one message"
    assert contents(output) == before
    with caplog.at_level("WARNING", logger="training"):
        record, seen = train_small(output, **changed, force=True)
    assert seen[0][0] == 3
    assert record["status"] == "finished"
    assert "--force: continuing although the rows differ" in caplog.text


def test_a_damaged_model_in_a_checkpoint_does_not_become_the_final_model(
    train_small: TrainFunction, copied: Path
) -> None:
    best = copied / "checkpoint-6"
    set_eval_loss(best, 0.1)
    flip(best / "model.safetensors", -1)
    with pytest.raises(
        TrainingError, match=r"checkpoint-6 cannot be used, because model.safetensors has changed"
    ):
        train_small(copied, final_model="best")
    shutil.rmtree(best)
    record, _ = train_small(copied, final_model="best")
    assert record["model_of_step"] != 6


def test_a_damaged_newer_checkpoint_is_written_again(
    train_small: TrainFunction, undisturbed: tuple[Path, list], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    train_small(output, stop_at=9)
    optimizer = output / "checkpoint-9" / "optimizer.pt"
    flip(optimizer, optimizer.stat().st_size // 2)
    _, seen = train_small(output, save_total_limit=1)
    assert seen[0][0] == 6, "the step after checkpoint-6"
    assert history(output) == history(undisturbed[0])
    assert not any(map(checkpoint.problems_of, checkpoint.checkpoints(output)))


def test_a_run_of_an_earlier_version_that_held_out_more_than_half_is_resumed(
    train_small: TrainFunction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier version took every number below that of the rows, typed or not, and recorded it in the options.

    It had no options for a part of a dataset on the Hub.
    """
    output = tmp_path / "out"
    with monkeypatch.context() as earlier:
        earlier.setattr(prepare, "held_out_size", lambda test_size, rows, recorded: test_size)
        train_small(output, test_size=60, stop_at=2)
    former = json.loads((output / "run.json").read_text())
    assert former["options"]["test_size"] == 60
    for name in ("dataset_config", "dataset_split", "dataset_revision"):
        assert former["options"].pop(name) is None
    (output / "run.json").write_text(json.dumps(former))
    for typed, status, first in ((None, "stopped", 2), (60, "finished", 3)):
        record, seen = train_small(output, test_size=typed, stop_at=3 if status == "stopped" else None)
        assert (record["status"], record["options"]["test_size"]) == (status, 60)
        assert seen[0][0] == first, "the step after the checkpoint"


def test_the_record_has_the_number_of_held_out_rows_that_was_chosen(
    train_small: TrainFunction, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "training"):
        record, _ = train_small(tmp_path / "out", test_size=None, max_steps=1)
    assert record["options"]["test_size"] == 7
    assert "7 of 70 rows are held out; --test-size chooses another number" in caplog.text


def test_a_stop_after_the_last_step_leaves_finishing_to_the_next_command(
    rows: str, model_with_dropout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = StopRequest()
    monkeypatch.setattr(steps, "run_steps", lambda *args: setattr(request, "received", True))
    options = options_of(
        tmp_path / "out", training_dataset=rows, test_size=10, input_model=model_with_dropout
    )
    with pytest.raises(Interrupted):
        train(options, request)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "running"


def test_forced_learning_rate_and_weight_decay_take_effect(
    train_small: TrainFunction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, groups = tmp_path / "out", []
    ended = StepGuard.on_train_end  # it completes the last save

    def note_rates(self: StepGuard, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        groups.extend((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)
        ended(self, *args, optimizer=optimizer, **kwargs)

    monkeypatch.setattr(StepGuard, "on_train_end", note_rates)
    train_small(output, stop_at=3)
    train_small(output, lr=1e-4, weight_decay=0.1, force=True, max_steps=6)
    rates = {entry["step"]: entry["learning_rate"] for entry in history(output) if "learning_rate" in entry}
    assert rates == {2: 1e-3, 4: 1e-4, 6: 1e-4}
    assert groups == [(1e-3, 0.0), (1e-3, 0.0), (1e-4, 0.1), (1e-4, 0.0)]


def test_the_record_with_the_starting_checkpoint_is_written_first(
    train_small: TrainFunction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, source = tmp_path / "new", tmp_path / "out" / "checkpoint-3"
    train_small(tmp_path / "out", stop_at=3)
    with monkeypatch.context() as killed:
        killed.setattr(ledger.Ledger, "save", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train_small(output, resume=str(source))
    assert {file.name for file in output.iterdir()} - set(WRITER_FILES) == {"run.json"}
    assert json.loads((output / "run.json").read_text())["begun_from"] == str(source)
    _, seen = train_small(output, stop_at=5)
    assert seen[0][0] == 3


def test_a_folder_that_another_run_filled_in_the_meantime_is_refused(
    train_small: TrainFunction,
    undisturbed: tuple[Path, list],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, real = tmp_path / "out", prepare.prepare

    def slowly(settings: Settings) -> Any:
        prepared = real(settings)
        shutil.copytree(undisturbed[0], output)
        return prepared

    def without_writer_files(folder: Path) -> dict[str, bytes]:
        return {name: content for name, content in contents(folder).items() if ".writer" not in name}

    monkeypatch.setattr(prepare, "prepare", slowly)
    with pytest.raises(OptionsError, match="is not empty, and training overwrites no files"):
        train_small(output, resume="never")
    assert without_writer_files(output) == without_writer_files(undisturbed[0])


def test_a_longer_run_is_refused_before_training_if_its_target_holds_the_shorter_model(
    train_small: TrainFunction, tmp_path: Path
) -> None:
    output, published = tmp_path / "out", tmp_path / "published"
    train_small(output, dbfs_output_dir=str(published), max_steps=2)
    before = contents(published)
    with pytest.raises(OptionsError, match=f"--dbfs-output-dir {published}: already holds something"):
        train_small(output, dbfs_output_dir=str(published), max_steps=4)
    assert contents(published) == before
    record, _ = train_small(output, dbfs_output_dir=str(published), max_steps=2)
    assert record["status"] == "finished"


def test_a_held_out_loss_measured_at_a_resume_can_be_the_final_one(
    train_small: TrainFunction, tmp_path: Path
) -> None:
    """Also if the folder is named by a link."""
    output, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(output)
    train_small(output, stop_at=3)
    assert checkpoint.read_manifest(output / "checkpoint-3")["eval_loss"] is None
    train_small(link, stop_at=5, resume=str(link / "checkpoint-3"))
    loss = checkpoint.read_manifest(output / "checkpoint-3")["eval_loss"]
    assert loss is not None
    shutil.rmtree(output / "checkpoint-5")  # killed before it was written
    record, _ = train_small(output, max_steps=3)
    assert record["held_out_loss"]["after"] == loss


# --- planned steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.0, 1.1, 2.0, 2.7, 3.0])
def test_planned_steps_equal_the_trainers(epochs: float, base_folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(base_folder), TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=epochs, use_cpu=True, report_to="none"))  # fmt: skip
    for rows in (1, 7, 8, 9, 63, 64, 65, 1000):
        for batch, accumulation in ((1, 1), (8, 1), (3, 2), (8, 8), (5, 3)):
            trainer.args.gradient_accumulation_steps = accumulation
            sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            sampler = GlobalBatchSampler(
                [4] * rows, batch * accumulation, world_size=1, rank=0, accumulation=accumulation, seed=1, deal="packed"
            )  # fmt: skip
            loader = torch.utils.data.DataLoader(list(range(rows)), batch_sampler=sampler)
            *_, steps = trainer.set_initial_training_values(trainer.args, loader)
            assert planned_steps(resolved(options_of(tmp_path, epochs=epochs, **sizes)), rows) == steps >= 1
    assert planned_steps(resolved(options_of(tmp_path, epochs=epochs, max_steps=5)), 10_000) == 5
