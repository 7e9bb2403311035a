"""Problems of --deepspeed, of its file and of the precision. The plan and the trainer report the same ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from training.options.deepspeed import enabled, offloads
from training.options.deepspeed_keys import key_problems
from training.options.settings import learning_rate
from training.options.trainer_options import TrainingOptions


def launch_problems(options: TrainingOptions) -> list[str]:
    """Problems of --deepspeed and of the launcher: no file, two files, no launcher, or turned off by the environment."""
    problems = []
    if options.rank_timeout != TrainingOptions.rank_timeout and "RANK" not in os.environ:
        problems.append(
            f"--rank-timeout {options.rank_timeout}: has no effect without a launcher, as there is one rank. Leave it out"
        )
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
    return problems


def quantize_problems(options: TrainingOptions, ranks: int) -> list[str]:
    """A problem if several ranks would train on weights in 4 bits, which only one device can. DeepSpeed is refused elsewhere."""
    if not options.quantize or ranks == 1 or options.deepspeed_json:
        return []
    return [
        f"--quantize {options.quantize}: weights in 4 bits are trained on by one rank, and {ranks} were started. "
        "Type CUDA_VISIBLE_DEVICES=0 python -m training.trainer ..., or leave out --quantize"
    ]


def file_problems(options: TrainingOptions, config: Mapping[str, Any], ranks: int) -> list[str]:
    """Why a run of `ranks` ranks with these options refuses a DeepSpeed file with this content (`read_json`)."""
    file = options.deepspeed_json
    problems = [f"{file} {problem}" for problem in key_problems(config)]
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    return problems + [
        f"{file} {problem}"
        for problem in (
            *_zero_problems(sections.get("zero_optimization", {})),
            *_stage_0_problems(options, config, sections.get("zero_optimization", {})),
            *_schedule_problems(options, config, sections.get("optimizer")),
            *_value_problems(options, config, sections.get("optimizer"), ranks),
        )
    ]


def _zero_problems(zero: Mapping[str, Any]) -> list[str]:
    stage, problems = zero.get("stage"), []
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        return [f"sets zero_optimization.stage {stage!r}, expected 3 (or 0, 1, 2)"]
    for section, stages in (("offload_param", (3,)), ("offload_optimizer", (1, 2, 3))):
        if offloads(zero, section) and stage not in stages:
            problems.append(
                f"sets zero_optimization.{section}, which DeepSpeed ignores at stage {stage}. "
                f"Remove it, or set the stage to {' or '.join(map(str, stages))}"
            )
    return problems


def _stage_0_problems(
    options: TrainingOptions, config: Mapping[str, Any], zero: Mapping[str, Any]
) -> list[str]:
    """Stage 0 in 16 bits: DeepSpeed's FP16_UnfusedOptimizer makes a step of zero gradients when it starts.

    Adam counts it, so its first steps are too small (measured: a held-out loss of 5.61 after a step, 5.46 at stage 3).
    """
    for name in ("bf16", "fp16"):
        typed = getattr(options, name)
        if zero.get("stage") == 0 and (typed or (typed is None and enabled(config, name))):
            return [
                f"trains in {name} at stage 0, where the first steps of DeepSpeed's Adam are too small. "
                "Set zero_optimization.stage to 1, 2 or 3"
            ]
    return []


def _schedule_problems(
    options: TrainingOptions, config: Mapping[str, Any], optimizer: Mapping[str, Any] | None
) -> list[str]:
    """A scheduler, or an optimizer that is not AdamW."""
    problems = []
    if "scheduler" in config:
        problems.append(
            f"has a 'scheduler', which would override --lr-scheduler-type {options.lr_scheduler_type} and "
            "--warmup-steps. Remove it from the JSON"
        )
    if optimizer is not None:
        kind = optimizer.get("type")
        if kind is None:
            problems.append("has an 'optimizer' without a 'type'. Write \"AdamW\", or remove the section")
        elif isinstance(kind, str) and kind.lower() not in ("adam", "adamw"):
            problems.append(f'sets optimizer.type {kind!r}, but the recipe\'s is AdamW. Write "AdamW"')
    return problems


def _value_problems(
    options: TrainingOptions, config: Mapping[str, Any], optimizer: Mapping[str, Any] | None, ranks: int
) -> list[str]:
    """Values that would override different values of the options."""
    parameters = (optimizer or {}).get("params", {})
    rows, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    problems = []
    for section, key, flag, value, implicit in (
        # `implicit` is the value that DeepSpeed uses if the file leaves the key out; None: DeepSpeed would fail.
        (config, "train_micro_batch_size_per_gpu", "--per-device-train-batch-size", rows, None),
        (config, "gradient_accumulation_steps", "--gradient-accumulation-steps", accumulation, 1),
        (config, "train_batch_size", "the product with all ranks", rows * accumulation * ranks, "auto"),
        (config, "gradient_clipping", "the recipe's", 1.0, 0.0),
        (parameters, "lr", "--lr", learning_rate(options), 1e-3),
        (parameters, "weight_decay", "--weight-decay", options.weight_decay, 0.0),
        (parameters, "betas", "the recipe's", [0.9, 0.999], "auto"),
        (parameters, "eps", "the recipe's", 1e-8, "auto"),
    ):
        if section is parameters and (optimizer is None or not isinstance(parameters, dict)):
            continue
        written = section.get(key, implicit)
        if isinstance(written, bool) or written not in ("auto", value):
            setting = f"sets {key} {written!r}" if key in section else f"leaves out {key}"
            problems.append(f'{setting}, but {flag} is {value}. Write "auto"')
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
