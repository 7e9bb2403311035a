"""The words of a command line: unknown options are answered with ours, and all problems are in one message."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from transformers import TrainingArguments

from flows import model_on_s3
from training import export, generate, publish, trainer
from training.options.other_names import OTHERWISE, SAME, advice_for
from training.plan.__main__ import main as plan
from training.tracking.__main__ import main as tracking

FLAGS = [name for option in trainer.main.params for name in (*option.opts, *option.secondary_opts)]


def test_all_unknown_options_and_wrong_values_are_reported_with_the_other_problems(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    words = [
        "--learning-rate", "1e-5", "--num_train_epochs=3", "--outputdir", "x", "--epochs", "one", "--bf16", "True", "-lr", "-1",
        "--force=yes", "stray", "--warmup-steps", "5", "--local-output-dir", str(tmp_path / "taken"), "--save-steps",
    ]  # fmt: skip
    result = CliRunner().invoke(trainer.main, words)
    assert result.exit_code == 2
    lines = [line.removeprefix("  - ") for line in result.output.splitlines()]
    for problem in (
        "No such option '--learning-rate'. Type --lr",
        "No such option '--num_train_epochs'. Type --epochs",
        "No such option '--outputdir'. Type --local-output-dir",
        "No such option '-lr'. Type --lr",
        "--bf16 takes no value, but 'True' follows it. Type --bf16 or --no-bf16",
        "'stray' belongs to no option. Put quotation marks around a value that has spaces",
        "Option '--force' does not take a value.",
        "Option '--save-steps' requires an argument.",
        "Invalid value for '--epochs': 'one' is not a number.",
        f"--local-output-dir {tmp_path / 'taken'}: is not empty, and training overwrites no files. Name a new folder",
    ):
        assert lines.count(problem) == 1, (problem, lines)
    assert any("--warmup-steps 5 would be ignored" in line for line in lines)
    assert len(lines) == 1 + 11


ODD_WORDS = {
    "a dash and a value": (["-=x"], "No such option '-'. --help lists the options"),
    "a word that only begins alike": (["--frobnicate"], "No such option '--frobnicate'. --help lists the options"),
    "no whole number": (["--seed", "1.5"], "Invalid value for '--seed': '1.5' is not a whole number."),
    "a value that looks like an option": (
        ["--deepspeed=-x.json"],
        "No such option '--deepspeed=-x.json'. Did you mean --deepspeed or --deepspeed_config",
    ),
    "an option as the value of another": (
        ["--lr", "--epochs", "1"],
        "'1' belongs to no option. Put quotation marks around a value that has spaces",
    ),
    "a word that is also a value": (
        ["--max-length", "8", "stray", "8"],
        "'8' belongs to no option. Put quotation marks around a value that has spaces",
    ),
    "a switch before it": (["--seed", "8", "--force", "8"], "--force takes no value, but '8' follows it. Type --force alone"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "problem"), ODD_WORDS.values(), ids=ODD_WORDS)
def test_odd_words_are_answered_with_what_is_wrong(words: list[str], problem: str) -> None:
    result = CliRunner().invoke(trainer.main, ["--local-output-dir", "new", *words])
    assert problem in [line.removeprefix("  - ") for line in result.output.splitlines()]
    assert "takes no value" in problem or "takes no value" not in result.output


# Alpaca's command line, TRL's, LLaMA-Factory's, open-instruct's and transformers' run_clm: theirs -> ours.
THEIRS = {
    "--model_name_or_path": "--input-model", "--data_path": "--training-dataset", "--output_dir": "--local-output-dir",
    "--num_train_epochs": "--epochs", "--per_device_train_batch_size": "--per-device-train-batch-size",
    "--per-device-batch-size": "--per-device-train-batch-size", "--evaluation_strategy": "--eval-steps",
    "--save_strategy": "--save-steps", "--learning_rate": "--lr", "--warmup_ratio": "--warmup-steps",
    "--lr_scheduler_type": "--lr-scheduler-type", "--fsdp": "--deepspeed", "--dataset_name": "--training-dataset",
    "--max_seq_length": "--max-length", "--packing": "--batching", "--cutoff_len": "--max-length", "--val_size": "--test-size",
    "--train_file": "--training-dataset", "--block_size": "--max-length", "--save_total_limit": "--save-total-limit",
    "--resume_from_checkpoint": "--resume", "--report_to": "--report-to", "--use_wandb": "--report-to", "--torch_dtype": "--bf16", "--model.name": "--input-model",
    "--load_best_model_at_end": "--final-model", "--push_to_hub": "--dbfs-output-dir", "--use_peft": "--lora 16",
    "--max_grad_norm": "clipped at a norm of 1.0", "--optim": "the optimizer is AdamW", "--gradient_checkpointing": "--gradient-checkpointing",
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), THEIRS.items())
def test_other_trainers_names_are_answered_with_ours(theirs: str, ours: str) -> None:
    assert ours in advice_for(theirs, FLAGS)


def test_the_table_names_only_options_that_exist_and_answers_each_name_once() -> None:
    names = [name for theirs in (*SAME.values(), *OTHERWISE.values()) for name in theirs.split()]
    assert len(names) == len(set(names))
    assert set(SAME) <= set(FLAGS)
    assert not {f"--{name}" for name in names} & set(FLAGS)
    for advice in OTHERWISE:
        named = [word.strip(".,:") for word in advice.split() if word.startswith("--")]
        assert set(named) - {"--num_gpus", "--module"} <= set(FLAGS), advice


# Fields of transformers' TrainingArguments for which a wrong guess would be worse than "Leave it out".
WITHOUT_ADVICE = {
    "lr_scheduler_kwargs", "average_tokens_across_devices", "label_smoothing_factor", "tf32", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache", "neftune_noise_alpha",
    "torch_empty_cache_steps", "auto_find_batch_size", "log_on_each_node", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object",
    "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "save_only_model", "save_on_each_node",
    "enable_jit_checkpoint", "hub_private_repo", "hub_always_push", "hub_revision", "ignore_data_skip",
    "restore_callback_states_from_checkpoint", "full_determinism", "use_cpu", "accelerator_config", "parallelism_config",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns",
    "label_names", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "debug", "skip_memory_metrics", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
}  # fmt: skip


def test_every_field_of_transformers_training_arguments_is_an_option_or_is_answered() -> None:
    names = {name for theirs in (*SAME.values(), *OTHERWISE.values()) for name in theirs.split()}
    for field in fields(TrainingArguments):
        name = field.name.replace("_", "-")
        ours = f"--{name}" in FLAGS or field.name == "local_rank"
        assert ours + (name in names) + (field.name in WITHOUT_ADVICE) == 1, field.name


def test_plan_publish_and_generate_report_all_problems_of_their_words_as_well(tmp_path: Path) -> None:
    for command, words, expected in (
        (plan, ["--machine", "8xH100", "--dataset_name", "x", "--epochs", "many", "--model_name_or_path", "x"],
         ["'--dataset_name'. Type --training-dataset", "'--epochs'", "'--model_name_or_path'. Type --input-model"]),
        (publish.main, ["--model", str(tmp_path / "none"), "--target", "x"],
         ["no such folder", "No such option '--target'. --help lists the options", "Missing option '--to'"]),
        (generate.main, ["--model", "demo", "--greeedy", "--max_new_tokens", "5", ""],
         ["'--greeedy'. Did you mean --greedy", "'--max_new_tokens'. Type --max-new-tokens", "INSTRUCTION is empty"]),
    ):  # fmt: skip
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 2
        for words in expected:
            assert words in result.output, result.output


@pytest.mark.parametrize(
    ("command", "words", "empty"),
    [
        (publish.main, ["--model", ".", "--to", ""], "--to"),
        (export.main, ["--checkpoint", ".", "--to", " "], "--to"),
        (tracking, ["--model", ""], "--model"),
        (model_on_s3.main, ["7", "--to", ""], "--to"),
    ],
)
def test_an_empty_path_is_refused_and_not_taken_for_the_working_folder(
    command: click.Command, words: list[str], empty: str
) -> None:
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2
    assert f"Error: {empty} is empty. Give a value\n" in result.output
