"""The command line: Dolly's defaults, the launchers' spellings, all problems in one message; and the precision."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.conftest import fake_gpus
from training import trainer
from training.machine import kernels
from training.machine.kernels import best_precision
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.ranks import is_main_process, world_size
from training.run import ending, preflight

BF16_JSON = "config/ds_z3_bf16_config.json"
FP16_JSON = "config/ds_z3_fp16_config.json"

pytestmark = pytest.mark.usefixtures("in_repository_root")


@pytest.fixture
def parsed_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrainingOptions]:
    """Collects the options that the command line passes to `train`, which is replaced."""
    parsed: list[TrainingOptions] = []

    def train(options: TrainingOptions, request: object) -> dict[str, str]:
        parsed.append(options)
        return {"status": "finished"}

    monkeypatch.setattr(trainer, "train", train)
    return parsed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(trainer.main, list(arguments))


# --- the command line --------------------------------------------------------------------------------


def test_the_defaults_are_those_of_dolly(tmp_path: Path, parsed_options: list[TrainingOptions]) -> None:
    result = run("--local-output-dir", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    [parsed] = parsed_options
    assert parsed == TrainingOptions(local_output_dir=str(tmp_path / "out"))
    assert parsed.input_model == "EleutherAI/gpt-j-6B"
    assert parsed.training_dataset == ("tatsu-lab/alpaca",)
    assert (parsed.epochs, parsed.lr, parsed.seed, parsed.test_size) == (3, None, 42, None)
    assert (parsed.per_device_train_batch_size, parsed.per_device_eval_batch_size) == (8, 8)
    assert (parsed.lr_scheduler_type, parsed.warmup_steps, parsed.weight_decay) == ("constant", 0, 0)
    assert (parsed.logging_steps, parsed.eval_steps) == (10, 100)
    assert (parsed.gradient_checkpointing, parsed.max_tokens_per_device) == ("auto", "auto")
    assert parsed.trust_remote_code is False
    assert parsed.bf16 is parsed.fp16 is parsed.deepspeed is parsed.deepspeed_config is None


def test_dollys_command_line_is_accepted(tmp_path: Path, parsed_options: list[TrainingOptions]) -> None:
    result = run(
        "--deepspeed", BF16_JSON, "--epochs", "1", "--local-output-dir", str(tmp_path / "out"),
        "--dbfs-output-dir", str(tmp_path / "dbfs"), "--per-device-train-batch-size", "8",
        "--per-device-eval-batch-size", "8", "--lr", "1e-5", "--seed", "7", "--no-gradient-checkpointing",
        "--bf16", "--local_rank", "3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert parsed_options == [
        TrainingOptions(
            local_output_dir=str(tmp_path / "out"), dbfs_output_dir=str(tmp_path / "dbfs"), deepspeed=BF16_JSON,
            epochs=1.0, lr=1e-5, seed=7, gradient_checkpointing="off", bf16=True, local_rank=3,
        )
    ]  # fmt: skip


def test_the_launchers_spellings_are_accepted(tmp_path: Path, parsed_options: list[TrainingOptions]) -> None:
    # deepspeed puts --local_rank=N first; Spark's launcher appends a bare --deepspeed and the file.
    result = run(
        "--local_rank=1", "--local-output-dir", str(tmp_path), "--deepspeed", "--deepspeed_config", BF16_JSON
    )
    assert result.exit_code == 0, result.output
    [parsed] = parsed_options
    assert parsed.local_rank == 1
    assert parsed.deepspeed_json == BF16_JSON


GROUPS = ["Model and data", "Training", "Adapters (LoRA)", "Precision and devices", "Output"]


def test_every_field_is_an_option_with_a_group_and_a_help_text() -> None:
    parameters = {parameter.name: parameter for parameter in trainer.main.params}
    assert list(parameters) == [option.name for option in fields(TrainingOptions)]
    for option in fields(TrainingOptions):
        assert option.metadata["group"] in {*GROUPS, "Trackers"}
        assert parameters[option.name].help.endswith((".", "]", "(V100)."))


def test_help_shows_groups_units_and_defaults() -> None:
    result = CliRunner().invoke(trainer.main, ["--help"], terminal_width=110)
    assert result.exit_code == 0
    positions = [result.output.index(f"\n{heading}:\n") for heading in GROUPS]
    assert positions == sorted(positions)
    for line in (
        "--max-length TOKENS",
        "--test-size ROWS",
        "--warmup-steps STEPS",
        "--lr RATE",
        "--gradient-accumulation-steps BATCHES",
        "--gradient-checkpointing [auto|on|off]",
        "--max-tokens-per-device auto|TOKENS",
        "--resume never|auto|FOLDER",
        "--bf16 / --no-bf16",
        "--deepspeed_config FILE",
        "--local_rank RANK",
        "--max-shard-size SIZE",
        "[default: tatsu-lab/alpaca]",
        "[default: constant]",
        "[required]",
    ):
        assert line in result.output


def test_bad_values_and_bad_combinations_are_reported_in_one_message(tmp_path: Path) -> None:
    result = run(
        "--local-output-dir", str(tmp_path / "out"), "--test-size", "0", "--seed", "x", "--lr", "-1",
        "--lr-scheduler-type", "wavy", "--warmup-steps", "5", "--max-shard-size", "5", "--bf16", "--fp16",
        "--deepspeed", "config/none.json",
    )  # fmt: skip
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert lines[0] == "Cannot train:"
    assert len(lines) == 1 + 9
    for words in (
        "'--test-size': 0 is not in the range x>=1",
        "'--seed': 'x'",
        "'--lr': -1.0 is not in the range x>0",
        "'--lr-scheduler-type': 'wavy' is not one of",
        "--warmup-steps 5 would be ignored. Type --lr-scheduler-type constant_with_warmup",
        "--max-shard-size 5: expected a size such as 5GB",
        "--bf16 and --fp16 exclude each other. Give only one of them",
        "--deepspeed config/none.json: No such file or directory. Available are: /",
        "--deepspeed config/none.json needs a launcher. Type deepspeed --num_gpus N --module training.trainer",
    ):
        assert sum(words in line for line in lines) == 1, words


@pytest.mark.parametrize("bad", [["--lr", "-1"], ["--max-shard-size", "5"]], ids=["a value", "a combination"])
def test_problems_of_the_machine_are_reported_in_the_same_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: list[str]
) -> None:
    monkeypatch.setattr(
        preflight, "version_problems", lambda: ["Wrong package versions: torch 2.9 instead of 2.13.0"]
    )
    monkeypatch.setattr(kernels, "kernel_problems", lambda: ["no kernels for it"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    result = run("--local-output-dir", str(tmp_path / "taken"), *bad)
    assert result.exit_code == 2
    for words in (bad[0], "is not empty", "Wrong package versions: torch 2.9"):
        assert result.output.count(words) == 1, result.output
    # An unreadable value is reported before torch is imported.
    assert result.output.count("no kernels for it") == (bad[0] != "--lr")


NO_NUMBERS = [
    (flag, value, value)
    for flag in ("lr", "epochs", "weight-decay", "max-dropped-fraction")
    for value in ("nan", "inf")
]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *NO_NUMBERS,
        ("epochs", "0", "'--epochs': 0.0 is not in the range 0<x<=10000"),
        ("epochs", "1e300", "'--epochs': 1e+300 is not in the range 0<x<=10000"),
        ("max-steps", "1" + 30 * "0", "is not in the range 1<=x<=1000000000"),
        ("per-device-train-batch-size", "100000000", "is not in the range 1<=x<=1024"),
        ("gradient-accumulation-steps", "1" + 30 * "0", "is not in the range 1<=x<=1024"),
        ("bf61", "1", "No such option"),
    ],
)
def test_a_value_out_of_range_and_a_missing_output_are_reported_together(
    name: str, value: str, words: str
) -> None:
    result = run(f"--{name}", value)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert name == "bf61" or "Missing option '--local-output-dir'" in result.output
    assert f"--{name}" in result.output
    assert words in result.output


def test_rank_0_reports_problems_at_once_and_other_ranks_after_a_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ending.time, "sleep", waits.append)
    monkeypatch.setattr(ending.signal, "signal", lambda *_: None)  # or the next SIGTERM would end pytest
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, grace in ((0, []), (1, [ending.RANK_0_GRACE])):
        waits.clear()
        monkeypatch.setenv("RANK", str(rank))
        result = run("--local-output-dir", str(tmp_path / "out"), "--bf16", "--fp16")
        assert (result.exit_code, waits) == (2, grace)
        assert "exclude each other" in result.output
        assert not (tmp_path / "out").exists()


# --- precision and ranks -----------------------------------------------------------------------------

CPU, V100, A100 = None, False, True  # whether the device supports bf16
OPEN = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
PRECISIONS = [
    # options, DeepSpeed file, device -> precision
    ({}, None, CPU, "fp32"),
    ({}, None, V100, "fp16"),
    ({}, None, A100, "bf16"),
    ({"bf16": True}, None, CPU, "bf16"),
    ({"bf16": False}, None, A100, "fp32"),
    ({"fp16": True}, None, A100, "fp16"),
    ({"fp16": False}, None, V100, "fp32"),
    ({}, BF16_JSON, CPU, "bf16"),
    ({}, FP16_JSON, V100, "fp16"),
    ({}, FP16_JSON, A100, "fp16"),
    ({"bf16": True}, BF16_JSON, A100, "bf16"),
    ({}, OPEN, A100, "fp32"),
    ({"bf16": True}, OPEN, A100, "bf16"),
    ({"fp16": True}, OPEN, V100, "fp16"),
    ({}, {}, A100, "fp32"),
]


@pytest.mark.parametrize(("flags", "file", "device", "precision"), PRECISIONS)
def test_the_precision_comes_from_options_then_deepspeed_file_then_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, bool],
    file: str | dict[str, Any] | None,
    device: bool | None,
    precision: str,
) -> None:
    if device is not CPU:
        fake_gpus(monkeypatch, bf16=device)
    if isinstance(file, dict):
        (tmp_path / "ds.json").write_text(json.dumps(file))
    path = str(tmp_path / "ds.json") if isinstance(file, dict) else file
    assert (
        resolve(
            TrainingOptions(local_output_dir="out", deepspeed=path, **flags), 1, best_precision()
        ).precision
        == precision
    )


def test_the_main_process_is_chosen_by_rank_not_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main_process()
    assert world_size() == 1
    monkeypatch.setenv("LOCAL_RANK", "0")  # Spark's launcher gives every rank the local rank 0
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not is_main_process()
    assert world_size() == 4
