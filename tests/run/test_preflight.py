"""Each problem of the options is reported before anything is loaded, with what to type instead."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.conftest import fake_gpus, jsonl, problems_of, rows_of
from training.errors import DataError, OptionsError, printable
from training.files import SCRATCH
from training.options.deepspeed import read_json
from training.options.trainer_options import TrainingOptions
from training.run.prepare import tokenised_rows
from training.run.start import find_start
from training.storage import checkpoint

BF16_JSON = "config/ds_z3_bf16_config.json"
FP16_JSON = "config/ds_z3_fp16_config.json"

pytestmark = pytest.mark.usefixtures("in_repository_root")


launched = pytest.mark.usefixtures("one_rank")


def options(tmp_path: Path, **changed: Any) -> TrainingOptions:
    return TrainingOptions(**{"local_output_dir": str(tmp_path / "out")} | changed)


def written(path: Path, config: Any) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def test_deepspeed_without_a_launcher_or_a_file_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(options(tmp_path, deepspeed=BF16_JSON))
    assert "needs a launcher. Type deepspeed --num_gpus N --module training.trainer" in problem
    [problem] = problems_of(options(tmp_path, deepspeed=""))
    assert problem == f"--deepspeed names no file. Type --deepspeed {BF16_JSON}"


def test_a_part_of_a_dataset_that_is_not_on_the_hub_is_refused(tmp_path: Path) -> None:
    chosen = {"training_dataset": "demo", "dataset_split": "test", "dataset_revision": "v1"}
    [problem] = problems_of(options(tmp_path, **chosen))
    assert problem.startswith(
        "--training-dataset demo: is not on the Hub, so --dataset-split and --dataset-revision"
    )
    assert problems_of(options(tmp_path, **chosen | {"training_dataset": "a/b"})) == []


def test_missing_rows_are_reported_with_the_other_problems(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "none.jsonl"), str(tmp_path / "none"), "./none"):
        problems = problems_of(options(tmp_path, training_dataset=missing, max_shard_size="5"))
        assert len(problems) == 2
        assert problems[1].startswith(
            f"--training-dataset {missing}: no such file. Expected a .json, .jsonl,"
        )
    for wrong in ("s3://b/c.json", "~nobody-here/rows.json", "x" * 300):
        [problem] = problems_of(options(tmp_path, training_dataset=wrong))
        assert problem.startswith(f"--training-dataset {wrong}: ")


def test_a_timeout_for_other_ranks_is_refused_without_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = problems_of(options(tmp_path, rank_timeout=60))
    assert problem.startswith("--rank-timeout 60: has no effect without a launcher")
    monkeypatch.setenv("RANK", "0")
    assert problems_of(options(tmp_path, rank_timeout=60)) == []


def test_a_length_beyond_the_models_is_refused_and_raising_it_is_advised_only_where_it_helps(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [row | {"output": "blue " * (100 * (n % 2) + 1)} for n, row in enumerate(rows_of(40))]
    source = {"input_model": str(base_folder), "training_dataset": jsonl(tmp_path / "rows.jsonl", rows)}
    with pytest.raises(
        OptionsError, match=r"--max-length 4096: a row of .* has at most 256 tokens\. Type --max-length 256"
    ):
        tokenised_rows(options(tmp_path, **source, max_length=4096))
    for length, words in (
        (None, "Correct the rows, or raise --max-dropped-fraction"),
        (200, "Correct the rows, raise --max-length to at most 256, or raise --max-dropped-fraction"),
        (16, "Correct the rows, raise --max-length to at most 256"),
    ):
        with pytest.raises(DataError) as refused:
            tokenised_rows(options(tmp_path, **source, max_length=length))
        assert str(refused.value).splitlines()[-1] == words


@launched
def test_two_different_deepspeed_files_are_refused_but_not_the_same_one_twice(tmp_path: Path) -> None:
    twice = options(tmp_path, deepspeed=BF16_JSON, deepspeed_config=BF16_JSON)
    assert problems_of(twice) == []
    other = written(tmp_path / "other.json", json.loads(Path(BF16_JSON).read_text()))
    [problem] = problems_of(options(tmp_path, deepspeed=BF16_JSON, deepspeed_config=other))
    assert problem.endswith("Give only one")


@launched
def test_an_environment_variable_that_disables_deepspeed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    [problem] = problems_of(options(tmp_path, deepspeed=BF16_JSON))
    assert "Type unset ACCELERATE_USE_CPU" in problem
    assert problems_of(options(tmp_path)) == []


BATCH = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
GOOD_CONFIG: dict[str, Any] = BATCH | {"zero_optimization": {"stage": 3}}
# Changes to the good file, and the message for each.
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a scheduler": ({"scheduler": {"type": "WarmupLR"}}, "would override --lr-scheduler-type constant"),
    "another rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}},
        'sets lr 2e-05, but --lr is 1e-05. Write "auto"',
    ),
    "another decay": (
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}}},
        "but --weight-decay is 0.0",
    ),
    "an optimizer with its own rate": (
        {"optimizer": {"type": "AdamW"}},  # DeepSpeed's default is 1e-3
        'leaves out lr, but --lr is 1e-05. Write "auto"',
    ),
    "an optimizer without a type": (
        {"optimizer": {"params": {"lr": "auto"}}},
        "has an 'optimizer' without a 'type'",
    ),
    **{
        f"{name} {value!r}": ({name: value}, f"sets {name} {value!r}, but {of}")
        for name, value, of in (
            ("train_micro_batch_size_per_gpu", 4, "--per-device-train-batch-size is 8"),
            ("train_micro_batch_size_per_gpu", "8", ""),
            ("gradient_accumulation_steps", 2, "--gradient-accumulation-steps is 1"),
            ("gradient_accumulation_steps", True, ""),
            ("train_batch_size", 64, "the product with all ranks is 8"),
            ("gradient_clipping", 0.5, "the recipe's is 1.0"),
        )
    },
    "a list for an object": ({"bf16": [True]}, "sets bf16 [True], expected an object"),
    "a word for an object": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": "auto"}},
        "sets zero_optimization.offload_optimizer 'auto', expected an object",
    ),
    "yes for true": (
        {"bf16": {"enabled": "yes"}},
        "sets bf16.enabled 'yes', expected true, false or \"auto\"",
    ),
    "a stage in words": (
        {"zero_optimization": {"stage": "3"}},
        "stage '3', expected 3 (or 0, 1, 2)",
    ),
    "a value that DeepSpeed cannot take": (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "much"}},
        "sets zero_optimization.reduce_bucket_size 'much', expected a whole number from 1 or \"auto\"",
    ),
    "an offload that DeepSpeed ignores": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "sets zero_optimization.offload_param, which DeepSpeed ignores at stage 2. Remove it, or set the stage to 3",
    ),
    "stage 0 in 16 bits": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
        "trains in bf16 at stage 0, where the first steps of DeepSpeed's Adam are too small. Set zero_optimization",
    ),
    "both precisions": (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "enables both bf16 and fp16. Remove one of them",
    ),
    "fp16 on a CPU": (
        {"fp16": {"enabled": True}},
        "fp16 needs a CUDA GPU, and this machine has none. Type --deepspeed config/ds_z3_fp32_config.json, or leave out --fp16",
    ),
    # None removes the key. DeepSpeed would fail only after the model is loaded, ...
    "no batch": (
        {"train_micro_batch_size_per_gpu": None},
        "leaves out train_micro_batch_size_per_gpu, but --per-device",
    ),
    # ... here it would not clip, ...
    "no clipping": (
        {"gradient_clipping": None},
        'leaves out gradient_clipping, but the recipe\'s is 1.0. Write "auto"',
    ),
    # ... and here it would train without accumulation.
    "no accumulation": ({"gradient_accumulation_steps": None}, 'steps is 4. Write "auto"'),
    "no stage": ({"zero_optimization": None}, "sets zero_optimization.stage None, expected 3"),
}


@launched
@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_deepspeed_file_that_contradicts_or_omits_the_options_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    content = {name: value for name, value in (GOOD_CONFIG | config).items() if value is not None}
    accumulation = 4 if config == {"gradient_accumulation_steps": None} else 1
    paths = {"deepspeed": written(tmp_path / "ds.json", content)}
    [problem] = problems_of(options(tmp_path, gradient_accumulation_steps=accumulation, **paths))
    assert message in problem


@launched
def test_a_deepspeed_file_that_agrees_with_the_options_is_accepted(tmp_path: Path) -> None:
    config = {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": "auto"}},
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    }
    assert problems_of(options(tmp_path, deepspeed=written(tmp_path / "ds.json", config))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Is not a regular file"),
        ("{", "broken JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ("\xff", "broken JSON"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "'enabled' appears twice"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["a pipe", "broken", "a list", "Latin-1", "a key twice", "deep"],
)
def test_a_deepspeed_file_that_is_not_a_json_object_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "ds.json"
    os.mkfifo(path) if content is None else path.write_bytes(content.encode("latin-1"))
    with pytest.raises(OptionsError, match=message):
        read_json(str(path))
    assert any(message in problem for problem in problems_of(options(tmp_path, deepspeed=str(path))))


@launched
@pytest.mark.parametrize(
    ("file", "precision", "message"),
    [
        (BF16_JSON, {"fp16": True}, "--fp16, but config/ds_z3_bf16_config.json trains in bf16"),
        (FP16_JSON, {"bf16": True}, "--bf16, but config/ds_z3_fp16_config.json trains in fp16"),
        (BF16_JSON, {"bf16": False}, "--no-bf16, but config/ds_z3_bf16_config.json has bf16.enabled true"),
        (FP16_JSON, {"fp16": False}, "--no-fp16, but config/ds_z3_fp16_config.json has fp16.enabled"),
    ],
)
def test_a_precision_that_contradicts_the_deepspeed_file_is_refused(
    tmp_path: Path, file: str, precision: dict[str, bool], message: str
) -> None:
    [problem] = problems_of(options(tmp_path, deepspeed=file, **precision))
    assert problem.startswith(message)


def test_a_precision_that_the_device_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = problems_of(options(tmp_path, fp16=True))
    assert problem.startswith("fp16 needs a CUDA GPU")
    fake_gpus(monkeypatch, bf16=False)
    [problem] = problems_of(options(tmp_path, bf16=True))
    assert (
        "Tesla V100-SXM2-32GB cannot compute in bf16. Use --deepspeed config/ds_z3_fp16_config.json, or --fp16"
        in problem
    )
    assert problems_of(options(tmp_path, fp16=True)) == []


def test_several_gpus_with_one_rank_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, bf16=True, count=8)
    [problem] = problems_of(options(tmp_path))
    assert "8 GPUs are visible, but one rank was started. Type deepspeed --num_gpus 8 --module" in problem
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert problems_of(options(tmp_path, deepspeed=BF16_JSON)) == []


@pytest.mark.parametrize(
    "folder", ["/dbfs/dolly", "/Volumes/main/dolly", "/dbfs", "/tmp/../dbfs/x", "dbfs:/x"]
)
def test_dbfs_and_volumes_are_refused_as_the_local_output(folder: str) -> None:
    problems = problems_of(TrainingOptions(local_output_dir=folder))
    assert any(
        "DBFS and Volumes do not support random writes" in problem and "/local_disk0/" in problem
        for problem in problems
    )


def test_an_output_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert problems_of(options(tmp_path)) == []
    (tmp_path / "out" / "model.safetensors").touch()
    [problem] = problems_of(options(tmp_path))
    assert "is not empty" in problem
    assert "Name a new folder" in problem
    for folder, message in {
        "model.safetensors": "is a file",
        "model.safetensors/x": "cannot be written",
    }.items():
        [problem] = problems_of(options(tmp_path, local_output_dir=str(tmp_path / "out" / folder)))
        assert message in problem


def test_a_publishing_folder_that_is_not_empty_or_is_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").touch()
    for folder, message in {
        "old": "already holds something",
        "old/config.json": "already holds something",
        "out": "is the run's own output folder",
        "old/config.json/x": "cannot be written",
        "zz9://x": "there is no file system",
        "dbfs:/dolly": "a path is needed. Type /dbfs/dolly",
    }.items():
        target = folder if ":/" in folder else str(tmp_path / folder)
        [problem] = problems_of(options(tmp_path, dbfs_output_dir=target))
        assert problem.startswith(f"--dbfs-output-dir {target}: ")
        assert message in problem
    assert problems_of(options(tmp_path, dbfs_output_dir=str(tmp_path / "new"))) == []


@pytest.mark.parametrize(
    "folder", ["~nobody-here/x", "a\0b", "loop/x", "x" * 300], ids=["no home", "null byte", "loop", "long"]
)
@pytest.mark.parametrize("option", ["local_output_dir", "dbfs_output_dir"])
def test_a_folder_that_cannot_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    [problem] = problems_of(options(tmp_path, **{option: folder}))
    assert printable(folder) in problem
    assert "Name a folder of your own" in problem


@pytest.mark.parametrize("option", ["input_model", "training_dataset", "local_output_dir", "dbfs_output_dir"])
def test_empty_values_and_names_that_are_not_utf8_are_refused(tmp_path: Path, option: str) -> None:
    flag = "--" + option.replace("_", "-")
    [problem] = problems_of(options(tmp_path, **{option: ""}))
    assert problem == f"{flag} is empty. Give a value, or leave the option out"
    [problem] = problems_of(
        options(tmp_path, **{option: f"{tmp_path}/zeile\udce4"})
    )  # Latin-1 on a Linux disk
    assert problem.startswith(f"{flag} '{tmp_path}/zeile\\udce4': is not UTF-8")
    (tmp_path / "Zeile-ä").mkdir()
    assert problems_of(options(tmp_path, **{option: f"{tmp_path}/Zeile-ä"})) == []


@pytest.fixture
def without_root_write_access() -> Iterator[None]:
    """Removes root's right to write anywhere (CAP_DAC_OVERRIDE); the process stays root to read this checkout."""
    if os.getuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("only Linux lets root give up a capability")
    libc, version_3_of_this_thread = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)()  # capset(2): effective, permitted, inheritable, twice
    assert libc.capget(version_3_of_this_thread, rights) == 0
    rights[0] ^= (may_write := rights[0] & 1 << 1)  # CAP_DAC_OVERRIDE
    assert libc.capset(version_3_of_this_thread, rights) == 0
    try:
        yield
    finally:
        rights[0] |= may_write
        assert libc.capset(version_3_of_this_thread, rights) == 0


@pytest.mark.usefixtures("without_root_write_access")
@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_an_output_folder_without_write_permission_is_refused(tmp_path: Path, below: str) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    [problem] = problems_of(options(tmp_path, local_output_dir=str(locked / below)))
    assert problem.startswith(f"--local-output-dir {locked / below}: cannot be written")


def test_the_folder_of_a_run_is_answered_with_its_newest_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a run"
    for step in (2, 10, 12):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        if step < 12:  # the last one was cut off
            checkpoint.write_manifest(run / f"checkpoint-{step}", None, [], {})
    [problem] = problems_of(options(tmp_path, resume=str(run)))
    newest = f"Type --resume '{run}/checkpoint-10', the newest complete checkpoint there"
    assert problem == f"--resume {run}: is not the folder of a checkpoint. {newest}"
    with pytest.raises(OptionsError, match=re.escape(f"it was not written to the end. {newest}")):
        find_start(tmp_path / "out", options(tmp_path, resume=f"{run}/checkpoint-12"), {}, 20)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert problems_of(options(tmp_path, resume="~/a run/checkpoint-10")) == []
    (run / "run.json").touch()
    [problem] = problems_of(options(tmp_path, resume=str(run), local_output_dir=str(run)))
    assert problem.endswith("Type --resume auto for the newest complete checkpoint")
    (tmp_path / "other").mkdir()
    [problem] = problems_of(options(tmp_path, resume=str(tmp_path / "other")))
    assert "There is no complete checkpoint to continue from. Leave --resume out" in problem
    [problem] = problems_of(options(tmp_path, resume="none"))
    assert problem == "--resume none: no such folder. Type never, auto, or the folder of a checkpoint"


def test_a_dangling_link_and_a_folder_below_proc_are_refused_as_output(
    tmp_path: Path,
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "out")
    nowhere = [Path("/proc/dolly")] if Path("/proc/self").exists() else []
    for folder in (tmp_path / "link", tmp_path / "link" / "below", *nowhere):
        [problem] = problems_of(TrainingOptions(local_output_dir=str(folder)))
        assert problem == f"--local-output-dir {folder}: cannot be written. Name a folder of your own"


def test_valid_options_have_no_problems_and_the_write_check_leaves_no_files(
    tmp_path: Path,
) -> None:
    assert problems_of(options(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_start_do_not_count_as_content_of_the_output(tmp_path: Path) -> None:
    for name in ("trial", "0123456789abcdef", "resharded"):  # the second: Spark's probe of the nodes
        (tmp_path / "out" / f"{SCRATCH}{name}").mkdir(parents=True)
    (tmp_path / "out" / "run.json.partial").touch()
    assert problems_of(options(tmp_path)) == []


def test_other_ranks_ignore_files_that_rank_0_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems_of(options(tmp_path)) == []
