"""Advice is in the words of the command that was typed: trainer, notebook or flow."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from training.console import MessageFormatter
from training.errors import DataError, TrainingFailedError
from training.launch.exits import exit_meaning
from training.launch.restart import launch
from training.options.wording import (
    CELL,
    COMMAND,
    FLOW,
    NOTEBOOK,
    PARAMETERS,
    WIDGETS,
    worded,
)
from training.run.ending import exit_with_message

ROOT = Path(__file__).parents[2]
IN_CELL = f' (options: the cell "{CELL}")'

ADVICE = [  # trainer, flow, notebook
    (
        "Type --test-size 1000, or another number up to 26001",
        "Type --test-size 1000, or another number up to 26001",
        "Type 1000 in the widget test_size, or another number up to 26001",
    ),
    (
        "Correct the rows, raise --max-length, or raise --max-dropped-fraction",
        "Correct the rows, raise --trainer-options '--max-length', or raise --trainer-options '--max-dropped-fraction'",
        'Correct the rows, raise options["max_length"], or raise options["max_dropped_fraction"]' + IN_CELL,
    ),
    (
        "  - GPU memory: 9 GiB. Type --per-device-train-batch-size 8 --gradient-accumulation-steps 2",
        "  - GPU memory: 9 GiB. Type --trainer-options '--per-device-train-batch-size 8 --gradient-accumulation-steps 2'",
        '  - GPU memory: 9 GiB. Type options["per_device_train_batch_size"] = 8, options["gradient_accumulation_steps"] = 2'
        + IN_CELL,
    ),
    (
        "Type --lora 16 --per-device-train-batch-size 16, without --deepspeed",
        "Type --lora 16 --trainer-options '--per-device-train-batch-size 16'",
        'Type options["lora"] = 16, options["per_device_train_batch_size"] = 16' + IN_CELL,
    ),
    (
        "Type --gradient-checkpointing on. If it is on, type --max-tokens-per-device 2048.",
        "Type --trainer-options '--gradient-checkpointing on'. If it is on, type --trainer-options '--max-tokens-per-device 2048'.",
        'Type options["gradient_checkpointing"] = "on". If it is on, type options["max_tokens_per_device"] = 2048.'
        + IN_CELL,
    ),
    (
        "Make room, and type the same command with --resume auto",
        "Make room, and type the same command with resume instead of run",
        "Make room, and type the same command with the run's name in the widget resume",
    ),
    (
        "--resume: every checkpoint is damaged. Raise --epochs or --max-steps",
        "resume: every checkpoint is damaged. Raise --epochs or --max-steps",
        'the widget resume: every checkpoint is damaged. Raise the widget epochs or options["max_steps"]' + IN_CELL,
    ),
    (
        "or type --force to train anyway, or --no-bf16",
        "or type --trainer-options '--force' to train anyway, or --trainer-options '--no-bf16'",
        'or type options["force"] = True to train anyway, or options["bf16"] = False' + IN_CELL,
    ),
    (
        "--local-output-dir /a/b: is a file. Add --sample-prompts FILE (--rank-timeout)",
        "--local-training-root /a/b: is a file. Add --sample-prompts FILE (--trainer-options '--rank-timeout')",
        '/a/b in the widget local_training_root: is a file. Add options["sample_prompts"] = FILE (options["rank_timeout"])'
        + IN_CELL,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "flow", "notebook"), ADVICE)
def test_advice_names_the_option_as_the_typed_command_does(
    trainer: str, flow: str, notebook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worded(trainer) == trainer
    assert worded(trainer, FLOW) == flow
    assert worded(trainer, NOTEBOOK) == notebook
    monkeypatch.setenv(COMMAND, FLOW)
    assert worded(trainer) == flow, "the ranks of a flow"


def test_other_programs_options_and_quoted_ones_stay() -> None:
    for text in (
        "Type deepspeed --num_gpus 8 --module training.trainer ...",
        "--trainer-options '--epoch 3': No such option '--epoch'",
        "Start the container with --shm-size=16g",
        "Invalid value for '--lr': 'x' is not a number",
    ):
        assert worded(text, FLOW) == worded(text, NOTEBOOK) == text


def test_no_meaning_of_an_exit_code_tells_flow_or_notebook_to_type_resume_auto() -> None:
    for code in range(256):
        assert "--resume" not in worded(exit_meaning(code), FLOW) + worded(exit_meaning(code), NOTEBOOK)


def test_ranks_know_the_typed_command_and_end_in_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = f"import os; print(os.environ[{COMMAND!r}], flush=True); raise SystemExit(70)"
    with pytest.raises(TrainingFailedError, match=r"above\. Continue with resume instead of run\n"):
        launch([sys.executable, "-c", rank], typed=FLOW)
    assert capsys.readouterr().out == "flow\n"
    monkeypatch.setenv(COMMAND, FLOW)
    with pytest.raises(SystemExit), exit_with_message(None, 10):
        raise DataError("raise --max-length")
    assert capsys.readouterr().err == "Cannot train:\nraise --trainer-options '--max-length'\n"


def test_warnings_of_the_ranks_are_worded_and_shown_rows_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, FLOW)
    shown = [
        MessageFormatter(worded).format(
            logging.LogRecord("x", level, "", 0, "lower --weight-decay", (), None)
        )
        for level in (logging.WARNING, logging.INFO)
    ]
    assert shown == ["lower --trainer-options '--weight-decay'", "lower --weight-decay"]


def test_every_name_is_a_widget_of_the_notebook_or_a_parameter_of_the_flow() -> None:
    notebook = (ROOT / "notebooks" / "train_dolly.py").read_text()
    assert set(WIDGETS.values()) <= set(re.findall(r'widgets\.\w+\(\s*"(\w+)"', notebook))
    assert f"# MAGIC ## {CELL}\n" in notebook
    flow = (ROOT / "flows" / "train_dolly_flow.py").read_text()
    assert set(PARAMETERS) <= set(re.findall(r'= option\(\s*"(\w+)"', flow))
    for name in ("--local-training-root", "--dbfs-output-root", "--num-gpus", "--trainer-options"):
        assert f'Parameter("{name[2:]}"' in " ".join(flow.split()).replace("( ", "(")
