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
LARGEST_REGISTRY_FILE = (
    5 * 2**30
)  # S3 takes no more in one request, and not every way from MLflow splits a file


def option_problems(options: TrainingOptions) -> list[str]:
    """What is wrong with the options by themselves, on whatever machine they are used."""
    problems = []
    for option in fields(options):
        value, flag = getattr(options, option.name), flag_of(option.name)
        if isinstance(value, float) and not math.isfinite(value):  # click's ranges let nan and inf pass
            problems.append(f"{flag} {value}: expected a finite number")
        if isinstance(value, str) and option.name not in ("deepspeed", "deepspeed_config"):
            if not value.strip():  # of a shell variable that was never set
                problems.append(f"{flag} is empty. Give a value, or leave the option out")
            elif not value.isascii() and value.encode(errors="replace").decode() != value:
                # The model card is written when all is trained, and UTF-8 could not hold it.
                problems.append(f"{flag} {value!r}: is not UTF-8. Rename the file or folder")
    if options.warmup_steps and not SCHEDULES[options.lr_scheduler_type].warms_up:
        problems.append(
            f"--lr-scheduler-type {options.lr_scheduler_type} has no warm-up, so --warmup-steps "
            f"{options.warmup_steps} would be ignored. Type --lr-scheduler-type constant_with_warmup"
        )
    if options.batching == "padded" and options.max_tokens_per_device != "auto":
        problems.append(
            f"--max-tokens-per-device {options.max_tokens_per_device} splits packed rows, and --batching padded has none. "
            "Lower --per-device-train-batch-size and raise --gradient-accumulation-steps instead"
        )
    size = re.fullmatch(r"([1-9][0-9]{0,8})(KB|MB|GB)", options.max_shard_size)
    if not size:
        problems.append(f"--max-shard-size {options.max_shard_size}: expected a size such as 5GB or 500MB")
    elif options.logs_to_mlflow and int(size[1]) * SIZES[size[2]] > LARGEST_REGISTRY_FILE:
        problems.append(
            f"--max-shard-size {options.max_shard_size}: MLflow's stores take no file above 5GB. Type 5GB"
        )
    if options.sample_every is not None and options.sample_every.strip():
        if options.sample_prompts is None:
            problems.append(
                f"--sample-every {options.sample_every}, but nothing is asked. Add --sample-prompts FILE, or leave it out"
            )
        try:
            steps_between_samples(options, 1)
        except OptionsError as error:
            problems += error.problems
    return problems


# --- DeepSpeed and precision --------------------------------------------------------------------------


def deepspeed_problems(options: TrainingOptions, config: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with --deepspeed and the content of its file; None where that could not be read."""
    problems = []
    if options.deepspeed is not None and not options.deepspeed_json:
        problems.append("--deepspeed names no file. Type --deepspeed config/ds_z3_bf16_config.json")
    if options.deepspeed and options.deepspeed_config and options.deepspeed != options.deepspeed_config:
        problems.append(
            f"--deepspeed {options.deepspeed} and --deepspeed_config {options.deepspeed_config}: give one"
        )
    if options.deepspeed_json:
        if "RANK" not in os.environ:
            problems.append(
                f"--deepspeed {options.deepspeed_json} needs a launcher. "
                "Type deepspeed --num_gpus N --module training.trainer ... instead of python -m training.trainer ..."
            )
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            problems.append(
                "ACCELERATE_USE_CPU is set, and silently switches DeepSpeed off. Type unset ACCELERATE_USE_CPU"
            )
    if config is not None:
        problems += section_problems(options, config) + _value_problems(options, config)
    return problems


def section_problems(options: TrainingOptions, config: Mapping[str, Any]) -> list[str]:
    """Sections of the DeepSpeed JSON of the wrong type, or that training cannot use."""
    file, problems = options.deepspeed_json, []
    found = dict(config)
    for outer, inner in (
        ("optimizer", "params"),
        ("zero_optimization", "offload_optimizer"),
        ("zero_optimization", "offload_param"),
    ):
        found[f"{outer}.{inner}"] = _object(config.get(outer)).get(inner) or {}
    for name in ("bf16", "fp16", "optimizer", "zero_optimization", *(name for name in found if "." in name)):
        if name in found and not isinstance(found[name], dict):
            problems.append(f"{file} sets {name} {found[name]!r}, expected an object {{...}}")
    for name in ("bf16", "fp16"):
        value = _object(config.get(name)).get("enabled", "auto")
        if value not in (True, False, "auto") or type(value) in (int, float):
            problems.append(f'{file} sets {name}.enabled {value!r}, expected true, false or "auto"')
    if "scheduler" in config:
        problems.append(
            f"{file} has a 'scheduler', which would override --lr-scheduler-type "
            f"{options.lr_scheduler_type} and --warmup-steps silently. Remove it from the JSON"
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
    """Values of the DeepSpeed JSON that differ from the options, which it would override."""
    problems, parameters = [], _object(_object(config.get("optimizer")).get("params"))
    rows, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    product = rows * accumulation * world_size()
    for section, key, flag, value, unsaid in (
        # `unsaid` is what DeepSpeed takes where the file does not name the key; None: nothing it could work with
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
        written = section.get(key, unsaid)
        if isinstance(written, bool) or written not in ("auto", value):
            says = f"sets {key} {written!r}" if key in section else f"leaves out {key}"
            problems.append(f'{options.deepspeed_json} {says}, but {flag} is {value}. Write "auto"')
    return problems


def precision_problems(options: TrainingOptions, config: Mapping[str, Any]) -> list[str]:
    """Contradictions between options and DeepSpeed JSON over the precision."""
    file = options.deepspeed_json
    if options.bf16 and options.fp16:
        return ["--bf16 and --fp16 exclude each other. Give one of them"]
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
    """DeepSpeed's own reading of the JSON; its sections take an "auto" for their default by themselves. Imports torch."""
    from deepspeed.runtime.config import DeepSpeedConfig

    copy = {key: value for key, value in config.items() if (key, value) != ("gradient_clipping", "auto")}
    copy |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(json.loads(json.dumps(copy)))
    except Exception as error:  # assertions, pydantic's, missing attributes
        reason = " ".join(str(error).split())
        return [f"{file}: DeepSpeed refuses it ({type(error).__name__}: {reason})"]
    return []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --- folders ------------------------------------------------------------------------------------------


def output_problems(options: TrainingOptions) -> list[str]:
    """Why a run could not write into its output, or would write over what is there."""
    output = local_path(options.local_output_dir)
    if mounted_store(output.resolve()):
        return [
            f"--local-output-dir {options.local_output_dir}: training writes at random places, which DBFS and Volumes refuse. "
            "Name a local disk here (on Databricks /local_disk0/...), and this folder with --dbfs-output-dir"
        ]
    if output.exists() and not output.is_dir():
        return [f"--local-output-dir {output}: is a file. Name a new folder"]
    is_run = (output / RUN_FILE).is_file()
    if output.is_dir() and _holds_something(output) and not (options.resume != "never" and is_run):
        go_on = ", or type --resume auto to go on with its run" if is_run else ""
        return [
            f"--local-output-dir {output}: is not empty, and nothing in it shall be lost. Name a new folder{go_on}"
        ]
    if not writable(output):
        return [f"--local-output-dir {output}: cannot be written. Name a folder of your own"]
    return []


def _holds_something(folder: Path) -> bool:
    ours = (*WRITER_FILES, f"{RUN_FILE}{PARTIAL}")  # what a start leaves that is killed
    return any(file.name not in ours and not file.name.startswith(SCRATCH) for file in folder.iterdir())


def resume_problems(options: TrainingOptions) -> list[str]:
    """Why there is nothing that --resume could mean."""
    if options.resume in ("never", "auto") or Path(options.resume).expanduser().is_dir():
        return []
    return [f"--resume {options.resume}: no such folder. Type never, auto, or a checkpoint's folder"]
