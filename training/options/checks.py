"""Validates options and collects every problem with its fix."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from training.consts import RUN_FILE
from training.errors import OptionsError
from training.files import TRACE, WRITER_FILES, local_path, writable
from training.machine.kernels import device_problems
from training.options.deepspeed import json_enables, read_deepspeed_json
from training.options.trainer_options import TrainingOptions, precision_of, steps_between_samples
from training.ranks import is_main_process, world_size
from training.storage.target import target_problems
from training.tracking.mlflow_server import tracking_problems


def find_problems(options: TrainingOptions) -> list[str]:
    """Everything wrong with the options on this machine, each with what to type instead. Loads nothing."""
    problems = plain_problems(options)
    config: dict[str, Any] = {}
    if options.deepspeed is not None and not options.deepspeed_json:
        problems.append("--deepspeed names no file. Type --deepspeed config/ds_z3_bf16_config.json")
    if options.deepspeed and options.deepspeed_config and options.deepspeed != options.deepspeed_config:
        problems.append(
            f"--deepspeed {options.deepspeed} and --deepspeed_config {options.deepspeed_config}: give one"
        )
    if options.deepspeed_json:
        try:
            config = read_deepspeed_json(options.deepspeed_json)
        except OptionsError as error:
            problems += error.problems
        problems += _deepspeed_problems(options, config)
    problems += _precision_problems(options, config)
    problems += device_problems()
    problems += sampling_problems(options)
    return problems + target_problems_of(options)


def target_problems_of(options: TrainingOptions) -> list[str]:
    """Why what training makes could not be written where it shall go: output, published copy, MLflow.

    It does not depend on the ranks, so that notebook and flow can ask it before they start any.
    """
    problems = []
    if options.logs_to_mlflow:
        problems += tracking_problems("--mlflow-model-name", options.mlflow_model_name or None)
        problems += _large_file_problems(options)
    if not is_main_process():  # the other ranks may see what rank 0 has already begun to write
        return problems
    for flag, folder, check in (
        ("--local-output-dir", options.local_output_dir, output_problems),
        ("--dbfs-output-dir", options.dbfs_output_dir, _publishing_problems),
        ("--resume", options.resume, _resume_problems),
    ):
        if not (folder or "").strip():  # told already, or not asked for
            continue
        try:
            problems += check(options)
        except (OSError, RuntimeError, ValueError) as error:
            # a folder above it may not be entered, too long a name, ~nobody, links in a circle, a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            problems.append(f"{flag} {folder}: cannot be written ({reason}). Name a folder of your own")
    return problems


def plain_problems(options: TrainingOptions) -> list[str]:
    """What is wrong with the options by themselves, on whatever machine they are used."""
    problems = []
    for option in fields(options):
        value = getattr(options, option.name)
        if isinstance(value, float) and not math.isfinite(value):  # click's ranges let nan and inf pass
            problems.append(f"--{option.name.replace('_', '-')} {value}: expected a finite number")
        if isinstance(value, str) and option.name not in ("deepspeed", "deepspeed_config"):
            flag = f"--{option.name.replace('_', '-')}"
            if not value.strip():  # of a shell variable that was never set
                problems.append(f"{flag} is empty. Give a value, or leave the option out")
            elif not value.isascii() and value.encode(errors="replace").decode() != value:
                # The model card is written when all is trained, and UTF-8 could not hold it.
                problems.append(f"{flag} {value!r}: is not UTF-8. Rename the file or folder")
    if options.lr_scheduler_type == "constant" and options.warmup_steps:
        problems.append(
            f"--lr-scheduler-type constant has no warm-up, so --warmup-steps {options.warmup_steps} would be "
            "ignored. Type --lr-scheduler-type constant_with_warmup"
        )
    if options.batching == "padded" and options.max_tokens_per_device != "auto":
        problems.append(
            f"--max-tokens-per-device {options.max_tokens_per_device} splits packed rows, and --batching padded has none. "
            "Lower --per-device-train-batch-size and raise --gradient-accumulation-steps instead"
        )
    if not re.fullmatch(r"[1-9][0-9]{0,8}(KB|MB|GB)", options.max_shard_size):
        problems.append(f"--max-shard-size {options.max_shard_size}: expected a size such as 5GB or 500MB")
    return problems


def _deepspeed_problems(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    problems = []
    if "RANK" not in os.environ:
        problems.append(
            f"--deepspeed {options.deepspeed_json} needs a launcher. "
            "Type deepspeed --num_gpus N --module training.trainer ... instead of python -m training.trainer ..."
        )
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        problems.append(
            "ACCELERATE_USE_CPU is set, and silently switches DeepSpeed off. Type unset ACCELERATE_USE_CPU"
        )
    if "scheduler" in config:
        problems.append(
            f"{options.deepspeed_json} has a 'scheduler', which would override --lr-scheduler-type "
            f"{options.lr_scheduler_type} and --warmup-steps silently. Remove it from the JSON"
        )
    return problems + (_json_problems(options, config) if config else [])


def _json_problems(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    """What transformers, accelerate or DeepSpeed would refuse after loading the model, or change in silence."""
    file = options.deepspeed_json
    problems = []
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
        enabled = _object(config.get(name)).get("enabled", "auto")
        if enabled not in (True, False, "auto") or type(enabled) in (int, float):
            problems.append(f'{file} sets {name}.enabled {enabled!r}, expected true, false or "auto"')

    parameters = _object(found["optimizer.params"])
    rows, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    for section, key, flag, value, unsaid in (
        # `unsaid` is what DeepSpeed takes where the file does not name the key; None: nothing it could work with
        (config, "train_micro_batch_size_per_gpu", "--per-device-train-batch-size", rows, None),
        (config, "gradient_accumulation_steps", "--gradient-accumulation-steps", accumulation, 1),
        (
            config,
            "train_batch_size",
            "the product with all ranks",
            rows * accumulation * world_size(),
            "auto",
        ),
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
            problems.append(f'{file} {says}, but {flag} is {value}. Write "auto"')
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
    both = json_enables(config, "bf16") and json_enables(config, "fp16")  # told with the precision
    return problems if problems or both else _refusals(options, config)


def _refusals(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    """DeepSpeed's own reading of the JSON; its sections take an "auto" for their default by themselves."""
    from deepspeed.runtime.config import DeepSpeedConfig

    copy = {key: value for key, value in config.items() if (key, value) != ("gradient_clipping", "auto")}
    copy |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(json.loads(json.dumps(copy)))
    except Exception as error:  # assertions, pydantic's, missing attributes
        reason = " ".join(str(error).split())
        return [f"{options.deepspeed_json}: DeepSpeed refuses it ({type(error).__name__}: {reason})"]
    return []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _precision_problems(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    if options.bf16 and options.fp16:
        return ["--bf16 and --fp16 exclude each other. Give one of them"]
    if json_enables(config, "bf16") and json_enables(config, "fp16"):
        return [f"{options.deepspeed_json} enables both bf16 and fp16. Remove one of them from the JSON"]
    problems = []
    for name in ("bf16", "fp16"):
        asked, written = getattr(options, name), json_enables(config, name)
        if asked is not None and written is not None and asked != written:
            problems.append(
                f"--{'' if asked else 'no-'}{name}, but {options.deepspeed_json} has {name}.enabled {str(written).lower()}. "
                "Leave the option out, or choose another file from config/"
            )
    other = {"bf16": "fp16", "fp16": "bf16"}
    for name in other:
        if getattr(options, name) and json_enables(config, other[name]):
            problems.append(
                f"--{name}, but {options.deepspeed_json} trains in {other[name]}. Leave --{name} out"
            )
    if problems:
        return problems
    import torch

    try:
        precision = precision_of(options)
    except OptionsError:  # an unreadable JSON is told already
        return []
    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        return ["fp16 needs a CUDA GPU, and there is none here. Use config/ds_z3_bf16_config.json, or --bf16"]
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [
            f"{torch.cuda.get_device_name()} cannot compute in bf16. "
            "Use --deepspeed config/ds_z3_fp16_offload_config.json, or --fp16"
        ]
    return []


def sampling_problems(options: TrainingOptions) -> list[str]:
    """What is wrong with the instructions that the model shall answer as it trains; reads their file."""
    problems = []
    if options.sample_every is not None and options.sample_every.strip():
        if options.sample_prompts is None:
            problems.append(
                f"--sample-every {options.sample_every}, but nothing is asked. Add --sample-prompts FILE, or leave it out"
            )
        try:
            steps_between_samples(options, 1)
        except OptionsError as error:
            problems += error.problems
    if is_main_process() and (options.sample_prompts or "").strip():  # rank 0 reads them for all
        from training.data.rows import read_prompts
        from training.errors import DataError

        try:
            read_prompts(str(options.sample_prompts))
        except DataError as error:
            problems.append(f"--sample-prompts {error}")
    return problems


def output_problems(options: TrainingOptions) -> list[str]:
    """Why a run could not write into its output, or would write over what is there."""
    output, problems = local_path(options.local_output_dir), []
    if output.resolve().parts[:2] in (("/", "dbfs"), ("/", "Volumes")):
        problems.append(
            f"--local-output-dir {options.local_output_dir}: training writes at random places, which DBFS and Volumes refuse. "
            "Name a local disk here (on Databricks /local_disk0/...), and this folder with --dbfs-output-dir"
        )
    elif output.exists() and not output.is_dir():
        problems.append(f"--local-output-dir {output}: is a file. Name a new folder")
    elif output.is_dir() and _holds_something(output) and not (options.resume != "never" and _is_run(output)):
        go_on = ", or type --resume auto to go on with its run" if _is_run(output) else ""
        problems.append(
            f"--local-output-dir {output}: is not empty, and nothing in it shall be lost. Name a new folder{go_on}"
        )
    elif not writable(output):
        problems.append(f"--local-output-dir {output}: cannot be written. Name a folder of your own")
    return problems


def _publishing_problems(options: TrainingOptions) -> list[str]:
    target, output = str(options.dbfs_output_dir), None
    if "://" not in target:
        local_path(target).resolve()  # raises where links go in a circle
    with suppress(OSError, RuntimeError, ValueError):  # told of the local output
        output = local_path(options.local_output_dir or "").resolve()
    return [f"--dbfs-output-dir {fault}" for fault in target_problems(target, output)]


def _large_file_problems(options: TrainingOptions) -> list[str]:
    """S3 takes 5 GiB at most in one request, and not every way from MLflow to a store splits a file."""
    size = re.fullmatch(r"([1-9][0-9]{0,8})(KB|MB|GB)", options.max_shard_size)
    if size and int(size[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[size[2]] > 5 * 2**30:
        return [
            f"--max-shard-size {options.max_shard_size}: MLflow's stores take no file above 5GB. Type 5GB"
        ]
    return []


def _resume_problems(options: TrainingOptions) -> list[str]:
    if options.resume in ("never", "auto") or Path(options.resume).expanduser().is_dir():
        return []
    return [f"--resume {options.resume}: no such folder. Type never, auto, or a checkpoint's folder"]


def _holds_something(folder: Path) -> bool:
    ours = (*WRITER_FILES, f"{RUN_FILE}.partial")  # what a start leaves that is killed
    return any(file.name not in ours and not file.name.startswith(TRACE) for file in folder.iterdir())


def _is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()
