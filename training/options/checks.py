"""Validates options and collects every problem with its fix. Imports no torch at its top."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from training.consts import RUN_FILE
from training.errors import OptionsError
from training.files import PARTIAL, SCRATCH, WRITER_FILES, local_path, mounted_store, writable
from training.options.deepspeed import enabled
from training.options.trainer_options import SCHEDULES, TrainingOptions, flag_of, steps_between_samples
from training.ranks import world_size

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# S3 accepts no more in one request, and some of MLflow's upload paths do not split files.
LARGEST_REGISTRY_FILE = 5 * 2**30


def option_problems(options: TrainingOptions) -> list[str]:
    """Problems of the options themselves, independent of the machine."""
    problems = []
    for option in fields(options):
        value, flag = getattr(options, option.name), flag_of(option.name)
        if isinstance(value, float) and not math.isfinite(value):  # click's ranges let nan and inf pass
            problems.append(f"{flag} {value}: expected a finite number")
        if isinstance(value, str) and option.name not in ("deepspeed", "deepspeed_config"):
            if not value.strip():  # e.g. from an unset shell variable
                problems.append(f"{flag} is empty. Give a value, or leave the option out")
            elif not value.isascii() and value.encode(errors="replace").decode() != value:
                # Writing the model card, after training, would fail: it is UTF-8.
                problems.append(f"{flag} {value!r}: is not UTF-8. Rename the file or folder")
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
    elif options.logs_to_mlflow and int(size[1]) * SIZES[size[2]] > LARGEST_REGISTRY_FILE:
        problems.append(
            f"--max-shard-size {options.max_shard_size}: MLflow's stores accept files of at most 5GB. Type --max-shard-size 5GB"
        )
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


# --- DeepSpeed and precision --------------------------------------------------------------------------


def deepspeed_problems(options: TrainingOptions, config: Mapping[str, Any] | None) -> list[str]:
    """Problems of --deepspeed and of its file. `config` is the file's content, None if it could not be read."""
    problems = []
    if options.deepspeed is not None and not options.deepspeed_json:
        problems.append("--deepspeed names no file. Type --deepspeed config/ds_z3_bf16_config.json")
    if options.deepspeed and options.deepspeed_config and options.deepspeed != options.deepspeed_config:
        problems.append(
            f"--deepspeed {options.deepspeed} and --deepspeed_config {options.deepspeed_config} differ. Give only one"
        )
    if options.deepspeed_json:
        if "RANK" not in os.environ:
            problems.append(
                f"--deepspeed {options.deepspeed_json} needs a launcher. "
                "Type deepspeed --num_gpus N --module training.trainer ... instead of python -m training.trainer ..."
            )
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            problems.append(
                "ACCELERATE_USE_CPU is set, which silently disables DeepSpeed. Type unset ACCELERATE_USE_CPU"
            )
    if config is not None:
        problems += section_problems(options, config) + _value_problems(options, config)
    return problems


def section_problems(options: TrainingOptions, config: Mapping[str, Any]) -> list[str]:
    """Sections of the DeepSpeed JSON that have the wrong type or that training cannot use."""
    file, problems = options.deepspeed_json, []
    sections = dict(config)
    for outer, inner in (
        ("optimizer", "params"),
        ("zero_optimization", "offload_optimizer"),
        ("zero_optimization", "offload_param"),
    ):
        sections[f"{outer}.{inner}"] = _object(config.get(outer)).get(inner) or {}
    for name in (
        "bf16",
        "fp16",
        "optimizer",
        "zero_optimization",
        *(name for name in sections if "." in name),
    ):
        if name in sections and not isinstance(sections[name], dict):
            problems.append(f"{file} sets {name} {sections[name]!r}, expected an object {{...}}")
    for name in ("bf16", "fp16"):
        value = _object(config.get(name)).get("enabled", "auto")
        if value not in (True, False, "auto") or type(value) in (int, float):
            problems.append(f'{file} sets {name}.enabled {value!r}, expected true, false or "auto"')
    if "scheduler" in config:
        problems.append(
            f"{file} has a 'scheduler', which would override --lr-scheduler-type "
            f"{options.lr_scheduler_type} and --warmup-steps. Remove it from the JSON"
        )
    if isinstance(config.get("optimizer"), dict) and not isinstance(config["optimizer"].get("type"), str):
        problems.append(f"{file} has an 'optimizer' without a 'type'. Write \"AdamW\", or remove the section")
    zero = _object(config.get("zero_optimization"))
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"{file} sets zero_optimization.stage {stage!r}, expected 3 (or 0, 1, 2)")
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        problems.append(
            f"{file} would save an empty model: "
            "set zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
        )
    return problems


def _value_problems(options: TrainingOptions, config: Mapping[str, Any]) -> list[str]:
    """Values of the DeepSpeed JSON that would override different values of the options."""
    problems, parameters = [], _object(_object(config.get("optimizer")).get("params"))
    rows, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    product = rows * accumulation * world_size()
    for section, key, flag, value, implicit in (
        # `implicit` is the value that DeepSpeed uses if the file leaves the key out; None: DeepSpeed would fail.
        (config, "train_micro_batch_size_per_gpu", "--per-device-train-batch-size", rows, None),
        (config, "gradient_accumulation_steps", "--gradient-accumulation-steps", accumulation, 1),
        (config, "train_batch_size", "the product with all ranks", product, "auto"),
        (config, "gradient_clipping", "the recipe's", 1.0, "auto"),
        (parameters, "lr", "--lr", options.lr, 1e-3),
        (parameters, "weight_decay", "--weight-decay", options.weight_decay, 0.0),
        (parameters, "betas", "the recipe's", [0.9, 0.999], "auto"),
        (parameters, "eps", "the recipe's", 1e-8, "auto"),
    ):
        if section is parameters and "optimizer" not in config:
            continue
        written = section.get(key, implicit)
        if isinstance(written, bool) or written not in ("auto", value):
            setting = f"sets {key} {written!r}" if key in section else f"leaves out {key}"
            problems.append(f'{options.deepspeed_json} {setting}, but {flag} is {value}. Write "auto"')
    return problems


def precision_problems(options: TrainingOptions, config: Mapping[str, Any]) -> list[str]:
    """Contradictions about the precision between options and DeepSpeed JSON."""
    file = options.deepspeed_json
    if options.bf16 and options.fp16:
        return ["--bf16 and --fp16 exclude each other. Give only one of them"]
    if enabled(config, "bf16") and enabled(config, "fp16"):
        return [f"{file} enables both bf16 and fp16. Remove one of them from the JSON"]
    problems = []
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        typed, written = getattr(options, name), enabled(config, name)
        if typed is not None and written is not None and typed != written:
            problems.append(
                f"--{'' if typed else 'no-'}{name}, but {file} has {name}.enabled {str(written).lower()}. "
                "Leave the option out, or choose another file from config/"
            )
        if typed and enabled(config, other):
            problems.append(f"--{name}, but {file} trains in {other}. Leave --{name} out")
    return problems


def deepspeed_refusals(file: str, config: Mapping[str, Any]) -> list[str]:
    """Errors of DeepSpeed's own parser, which replaces "auto" inside sections by its defaults. Imports torch."""
    from deepspeed.runtime.config import DeepSpeedConfig

    copy = {key: value for key, value in config.items() if (key, value) != ("gradient_clipping", "auto")}
    copy |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(json.loads(json.dumps(copy)))
    except Exception as error:  # AssertionError, pydantic's ValidationError, AttributeError
        reason = " ".join(str(error).split())
        return [f"{file}: DeepSpeed rejects it ({type(error).__name__}: {reason})"]
    return []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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


def resume_problems(options: TrainingOptions) -> list[str]:
    """Whether --resume names a checkpoint folder that does not exist."""
    if options.resume in ("never", "auto") or Path(options.resume).expanduser().is_dir():
        return []
    return [f"--resume {options.resume}: no such folder. Type never, auto, or the folder of a checkpoint"]
