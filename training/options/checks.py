"""Validates options and collects every problem with its fix. Imports no torch at its top."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from training.consts import RUN_FILE
from training.errors import OptionsError
from training.files import PARTIAL, SCRATCH, WRITER_FILES, local_path, mounted_store, path_problem, writable
from training.options.intervals import steps_between_samples, typed_save_seconds
from training.options.reporting import report_problems, trackers_of
from training.options.trainer_options import SCHEDULES, TrainingOptions, flag_of

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# S3 accepts no more in one request, and some of MLflow's upload paths do not split files.
LARGEST_REGISTRY_FILE = 5 * 2**30
MAX_LORA_RANK = 1024
MAX_LORA_ALPHA = 10_000


def option_problems(options: TrainingOptions) -> list[str]:
    """Problems of the options themselves, independent of the machine."""
    problems = []
    for option in fields(options):
        value, flag = getattr(options, option.name), flag_of(option.name)
        if isinstance(value, float) and not math.isfinite(value):  # click's ranges let nan and inf pass
            problems.append(f"{flag} {value}: expected a finite number")
        if option.name not in ("deepspeed", "deepspeed_config"):
            problems += _text_problems(flag, value)
    problems += [problem for found in path_problems(options).values() for problem in found]
    if options.warmup_steps and not SCHEDULES[options.lr_scheduler_type].warms_up:
        problems.append(
            f"--lr-scheduler-type {options.lr_scheduler_type} has no warm-up, so --warmup-steps "
            f"{options.warmup_steps} would be ignored. Type --lr-scheduler-type constant_with_warmup"
        )
    if options.batching == "padded" and options.max_tokens_per_device != "auto":
        problems.append(
            f"--max-tokens-per-device {options.max_tokens_per_device} splits packed rows, but --batching padded has none. "
            "Lower --per-device-train-batch-size and raise --gradient-accumulation-steps instead"
        )
    size = re.fullmatch(r"([1-9][0-9]{0,8})(KB|MB|GB)", options.max_shard_size)
    if not size:
        problems.append(f"--max-shard-size {options.max_shard_size}: expected a size such as 5GB or 500MB")
    elif "mlflow" in trackers_of(options) and int(size[1]) * SIZES[size[2]] > LARGEST_REGISTRY_FILE:
        problems.append(
            f"--max-shard-size {options.max_shard_size}: MLflow's stores accept files of at most 5GB. Type --max-shard-size 5GB"
        )
    problems += _save_problems(options) + lora_problems(options) + report_problems(options)
    if options.sample_every is not None and options.sample_every.strip():
        if options.sample_prompts is None:
            problems.append(
                f"--sample-every {options.sample_every}: has no effect without --sample-prompts. "
                "Add --sample-prompts FILE, or leave out --sample-every"
            )
        try:
            steps_between_samples(options, 1)
        except OptionsError as error:
            problems += error.problems
    return problems


def _text_problems(flag: str, value: Any) -> list[str]:
    """Problems of an option's text, or of each of its texts: it is empty, or cannot be written to a file."""
    texts, problems = _texts(value), []
    for number, text in enumerate(texts, start=1):
        if not text.strip():  # e.g. from an unset shell variable
            which = f"{flag} number {number}" if len(texts) > 1 else flag
            problems.append(f"{which} is empty. Give a value, or leave the option out")
        elif not is_utf8(text):
            # Writing the model card, after training, would fail: it is UTF-8.
            ascii_only = sys.getfilesystemencoding() != "utf-8"
            fix = "Type export PYTHONUTF8=1" if ascii_only else "Rename the file or folder"
            problems.append(f"{flag} {text!r}: is not UTF-8. {fix}")
    return problems


def _texts(value: Any) -> tuple[str, ...]:
    """The texts of an option's value: none of a number, several of an option that was repeated."""
    return (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ()


def _save_problems(options: TrainingOptions) -> list[str]:
    """Problems of --save-every: it is no time, or steps decide."""
    every = options.save_every
    if every is None or not every.strip():  # reported above
        return []
    problems = []
    if options.save_steps is not None:
        problems.append(
            f"--save-every {every} and --save-steps {options.save_steps} contradict each other. Leave one out"
        )
    elif options.final_model == "best":
        problems.append(
            f"--save-every {every}: the best of checkpoints that a clock chose would differ from run to run. With "
            "--final-model best type --save-steps N instead"
        )
    try:
        typed_save_seconds(options)
    except OptionsError as error:
        problems += error.problems
    return problems


def lora_problems(options: TrainingOptions) -> list[str]:
    """Problems of --lora and of the options that need it. Whether the targets exist depends on the model."""
    problems = []
    if options.lora > MAX_LORA_RANK:
        problems.append(
            f"--lora {options.lora}: expected 0 to {MAX_LORA_RANK}; most adapters have rank 8 to 64. Type --lora 16"
        )
    if options.lora_alpha is not None and MAX_LORA_ALPHA < options.lora_alpha < math.inf:
        problems.append(
            f"--lora-alpha {options.lora_alpha:g}: expected at most {MAX_LORA_ALPHA}; most adapters have one to two times "
            "their rank. Leave it out for twice the rank"
        )
    if options.lora_targets.strip() and not all(name.strip() for name in options.lora_targets.split(",")):
        problems.append(
            f"--lora-targets {options.lora_targets}: expected all, or names of layers separated by commas, such as "
            "q_proj,v_proj. Leave it out for all linear layers"
        )
    if not options.lora:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            value = getattr(options, name)
            if value != getattr(TrainingOptions, name):
                problems.append(
                    f"{flag_of(name)} {value}: has no effect without --lora. Add --lora 16, or leave it out"
                )
        if options.quantize:
            problems.append(
                f"--quantize {options.quantize}: weights in 4 bits cannot be trained, only adapters on them. "
                "Add --lora 16, or leave it out"
            )
    if options.quantize and options.deepspeed_json:
        problems.append(
            f"--quantize {options.quantize}: DeepSpeed cannot train on weights in 4 bits. Leave out --deepspeed "
            f"{options.deepspeed_json} and type python -m training.trainer ..., on one GPU; or leave out --quantize"
        )
    return problems


def path_problems(options: TrainingOptions) -> dict[str, list[str]]:
    """Problems of the paths of files and folders, by the name of the field. Files are not read."""
    problems: dict[str, list[str]] = {}
    for option in fields(options):
        kind: Any = option.metadata.get("path")
        for path in _texts(getattr(options, option.name)) if kind else ():
            if not path.strip() or not is_utf8(path):  # reported above
                continue
            if problem := path_problem(path, kind):
                problems.setdefault(option.name, []).append(f"{flag_of(option.name)} {path}: {problem}")
    return problems


def check_max_length(options: TrainingOptions, positions: int) -> None:
    """Raises OptionsError if --max-length is more than the `positions` that a row of the model can have."""
    if options.max_length and options.max_length > positions:
        raise OptionsError(
            f"--max-length {options.max_length}: a row of {options.input_model} has at most {positions} tokens. "
            f"Type --max-length {positions}, or leave it out"
        )


def is_utf8(text: str) -> bool:
    """Whether typed text can be written to a file: it has no halves of surrogate pairs."""
    return text.isascii() or text.encode(errors="replace").decode() == text


# --- folders ------------------------------------------------------------------------------------------


def output_problems(options: TrainingOptions) -> list[str]:
    """Reasons why a run cannot write into its output folder, or would overwrite files there."""
    output = local_path(options.local_output_dir)
    if mounted_store(output.resolve()):
        return [
            f"--local-output-dir {options.local_output_dir}: DBFS and Volumes do not support random writes, which training needs. "
            "Name a local disk here (on Databricks /local_disk0/...), and this folder with --dbfs-output-dir"
        ]
    if output.exists() and not output.is_dir():
        return [f"--local-output-dir {output}: is a file. Name a new folder"]
    is_run = (output / RUN_FILE).is_file()
    if output.is_dir() and _has_files(output) and not (options.resume != "never" and is_run):
        resume = ", or type --resume auto to continue its run" if is_run else ""
        return [
            f"--local-output-dir {output}: is not empty, and training overwrites no files. Name a new folder{resume}"
        ]
    if not writable(output):
        return [f"--local-output-dir {output}: cannot be written. Name a folder of your own"]
    return []


def _has_files(folder: Path) -> bool:
    """Whether the folder has any files other than those of a start that was killed."""
    leftovers = (*WRITER_FILES, f"{RUN_FILE}{PARTIAL}")
    return any(file.name not in leftovers and not file.name.startswith(SCRATCH) for file in folder.iterdir())
