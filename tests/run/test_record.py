"""run.json is never half-written, and every difference that would change a resumed run is reported."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pytest

from tests.conftest import resolved
from training.data.held_out import rows_digest
from training.options.trainer_options import TrainingOptions
from training.run.identity import differences, new_record, recorded_test_size
from training.storage.record import read_run_record, write_run_record


def record_of(world_size: int = 8, rows: str = "abc", **options: Any) -> dict[str, Any]:
    """A new record as it is read back from the file."""
    options = {"local_output_dir": "out", "bf16": True} | options
    return json.loads(json.dumps(new_record(resolved(TrainingOptions(**options), world_size), rows)))


def test_the_record_holds_versions_options_and_commit() -> None:
    record = record_of(lr=2e-5)
    assert record["status"] == "running"
    assert (record["world_size"], record["precision"], record["options"]["lr"]) == (8, "bf16", 2e-5)
    assert (record["global_batch"], record["rows"]) == (64, "abc")
    for package in ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers"):
        assert record["versions"][package] == version(package)
    assert record["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", record["git_commit"])


def test_a_record_is_replaced_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run_record(tmp_path, {"status": "running"})
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_run_record(tmp_path, {"status": "finished"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running"}
    write_run_record(tmp_path, {"status": "finished"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "finished"}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"status": "running"}', '{"options": 3}', "\0\0"])
def test_an_unreadable_record_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert read_run_record(tmp_path) is None


def test_the_number_of_held_out_rows_comes_from_the_run_that_is_continued(tmp_path: Path) -> None:
    def recorded(resume: str, **record: Any) -> int | None:
        write_run_record(tmp_path, {"status": "running", "options": {"test_size": 9}} | record)
        return recorded_test_size(TrainingOptions(local_output_dir=str(tmp_path), resume=resume))

    assert recorded("never", status="finished") is None
    assert recorded("auto") is None, "without a checkpoint it starts at step 0, maybe with other rows"
    assert recorded("auto", status="finished") == 9
    assert recorded("auto", begun_from="/other/checkpoint-3") == 9
    assert recorded(str(tmp_path / "checkpoint-3")) == 9
    assert recorded("auto", status="finished", options={}) is None
    (tmp_path / "run.json").unlink()
    assert recorded_test_size(TrainingOptions(local_output_dir=str(tmp_path), resume="auto")) is None


# --- differences that change the result ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 1}, ["--seed was 42, but is now 1"]),
        ({"lr": 2e-5}, ["--lr was 1e-05, but is now 2e-05"]),
        ({"weight_decay": 0.1}, ["--weight-decay was 0.0, but is now 0.1"]),
        ({"input_model": "demo"}, ["--input-model was EleutherAI/gpt-j-6B, but is now demo"]),
        ({"batching": "padded"}, ["--batching was packed, but is now padded"]),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9},
            ["--lr-scheduler-type was constant, but is now constant_with_warmup", "--warmup-steps was 0, but is now 9"],
        ),
        ({"lora": 16}, ["--lr was 1e-05, but is now 0.0002", "--lora was 0, but is now 16",
                        "--lora-alpha was None, but is now 32.0"]),
        ({"bf16": None, "fp16": True}, ["the precision was bf16, but is now fp16"]),
        ({"rows": "other"}, ["the rows differ: another --training-dataset or part of it, --test-size, --max-length or "
                             "--keep-truncated, another prompt (training/data/prompt.py), or the file has changed "
                             "(it was tatsu-lab/alpaca)"]),
        ({"world_size": 4}, ["the global batch was 64 rows, but is now 32. Type --gradient-accumulation-steps 2"]),
        ({"world_size": 3}, ["the global batch was 64 rows, but is now 24: --per-device-train-batch-size x "
                             "--gradient-accumulation-steps x devices must stay the same"]),
        ({"gradient_accumulation_steps": 2},
         ["the global batch was 64 rows, but is now 128. Type --gradient-accumulation-steps 1"]),
    ],
)  # fmt: skip
def test_each_option_that_changes_the_result_is_reported_with_both_values(
    changed: dict[str, Any], expected: list[str]
) -> None:
    assert differences(record_of(), record_of(**changed)) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"world_size": 4, "gradient_accumulation_steps": 2},
        {"world_size": 1, "per_device_train_batch_size": 64},
        {"epochs": 5.0},
        {"max_steps": 7},
        {"local_output_dir": "elsewhere", "dbfs_output_dir": "copy"},
        {"eval_steps": 7, "save_steps": 9, "logging_steps": 3, "save_total_limit": 9},
        {"final_model": "best", "resume": "auto", "force": True},
    ],
)
def test_options_that_do_not_change_the_result_are_no_difference(changed: dict[str, Any]) -> None:
    assert differences(record_of(), record_of(**changed)) == []


def test_other_rows_of_a_run_of_an_earlier_version_are_explained() -> None:
    former = record_of()
    for name in ("dataset_config", "dataset_split", "dataset_revision"):
        del former["options"][name]
    assert differences(former, record_of()) == []
    [difference] = differences(former, record_of(rows="other"))
    assert (
        "also trained on blank inputs and instructions, and gave tokenizers such as Llama's other ids: "
        "finish the run with it, or start a new one" in difference
    )


def test_a_run_that_began_before_adapters_existed_still_resumes() -> None:
    former = record_of()
    for name in ("lora", "lora_alpha", "lora_dropout", "lora_targets", "quantize"):
        del former["options"][name]
    assert former["options"]["lr"] == 1e-5
    assert differences(former, record_of()) == []
    assert "--lora was 0, but is now 8" in differences(former, record_of(lora=8))


def test_a_base_that_was_moved_is_the_same_and_an_unknown_one_is_not() -> None:
    def record(folder: str, sha256: str | None, revision: str | None = None) -> dict[str, Any]:
        return record_of(lora=8, input_model=folder) | {
            "base": {"model": folder, "revision": revision, "sha256": sha256}
        }

    assert differences(record("b2", "0"), record("b3", "0")) == []
    assert differences(record("some/base", None, "c0"), record("other/base", None, "c0")) == []
    moved = "--input-model was b2, but is now b3"
    [model, weights] = differences(record("b2", "0"), record("b3", "1"))
    assert model == moved
    assert weights.startswith("the base model was b2 with weights of SHA-256 0, but is now b3")
    assert differences(record("b2", None), record("b3", None)) == [moved]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decaying_schedule_must_keep_its_end(schedule: str) -> None:
    former, now = record_of(lr_scheduler_type=schedule), record_of(lr_scheduler_type=schedule, epochs=1.0)
    assert differences(former, now) == ["--epochs was 3.0, but is now 1.0"]


def test_the_digest_changes_with_any_token_response_order_or_held_out_row() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "response_spans": [[2, 3]]},
        {"input_ids": [4, 5], "response_spans": [[1, 2]]},
    ]

    def digest(*parts: list[dict[str, Any]]) -> str:
        return rows_digest(*map(datasets.Dataset.from_list, parts))

    datasets_that_differ = [
        [rows],
        [rows[::-1]],
        [rows[:1]],
        [[rows[0] | {"input_ids": [1, 2, 9]}, rows[1]]],
        [[rows[0] | {"response_spans": [[1, 3]]}, rows[1]]],
        [[rows[0] | {"input_ids": [1, 2, 3, 2]}, rows[1]]],
        [[rows[0] | {"response_spans": [[1, 2], [2, 3]]}, rows[1]]],
        [[rows[0] | {"response_spans": [[1, 1], [2, 3]]}, rows[1]]],
        [rows, [{"input_ids": [3, 4], "response_spans": [[1, 2]]}]],
        [rows, [{"input_ids": [3, 5], "response_spans": [[1, 2]]}]],
        [
            [*rows, {"input_ids": [3, 4], "response_spans": [[1, 2]]}],
            [{"input_ids": [3, 5], "response_spans": [[1, 2]]}],
        ],
    ]
    digests = [digest(*parts) for parts in datasets_that_differ]
    assert digests == [digest(*parts) for parts in datasets_that_differ]
    assert len(set(digests)) == len(digests)
    # As versions before conversations made it, whose runs are resumed.
    assert digests[0] == "f874350fb1362a1802d2caf74c54f89b9f540dfdb3be38c545de0cf1aa46ab28"
