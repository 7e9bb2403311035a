"""Checks options, machine and plan before anything expensive; every problem is in one message."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import GIB
from training.data.rows import read_prompts
from training.errors import DataError, OptionsError
from training.files import disk_problems, duration, local_path
from training.machine import kernels
from training.machine.environment import version_problems
from training.options import checks
from training.options.deepspeed import read_json
from training.options.settings import Settings, resolve
from training.options.trainer_options import TrainingOptions
from training.ranks import is_main_process, on_rank_0, on_this_host, world_size
from training.storage.target import target_problems
from training.tracking.mlflow_server import tracking_problems

if TYPE_CHECKING:
    from training.plan.fit import Plan
    from training.run.prepare import Prepared

logger = logging.getLogger(__name__)


def check(options: TrainingOptions, typing_errors: Sequence[str] = ()) -> Settings:
    """The run's settings. Raises OptionsError with every problem of options and machine.

    `typing_errors` are values that the command line could not take. With them torch is not imported, and what needs
    it is not checked: whoever mistyped has the answer at once.
    """
    problems, config = [*typing_errors, *checks.option_problems(options)], None
    settings: Settings | None = None
    if options.deepspeed_json:
        try:
            config = read_json(options.deepspeed_json)
        except OptionsError as error:
            problems += error.problems
    problems += checks.deepspeed_problems(options, config)
    contradictions = checks.precision_problems(options, config or {})
    problems += contradictions
    problems += prompt_problems(options) + place_problems(options) + version_problems()
    if not typing_errors:
        problems += _machine_problems(config)
        readable = config is not None or not options.deepspeed_json
        if not contradictions and (readable or options.bf16 or options.fp16):
            settings = resolve(options, world_size(), kernels.best_precision(), config if readable else {})
            problems += kernels.precision_problems(settings.precision)
        if config is not None and not problems:
            problems += checks.deepspeed_refusals(str(options.deepspeed_json), config)
    if problems or settings is None:
        raise OptionsError(*problems)
    return settings


def _machine_problems(config: dict[str, Any] | None) -> list[str]:
    """What this machine lacks, as torch and DeepSpeed see it: kernels of its GPUs, a compiler, a rank for each GPU."""
    problems = kernels.kernel_problems()
    if config is not None and not problems and not version_problems():
        from training.run.operators import compiler_problems

        problems += compiler_problems(config)
    return problems + kernels.device_problems()


def place_problems(options: TrainingOptions) -> list[str]:
    """Why the run's results could not be written where they shall go: output, published copy, MLflow.

    It does not depend on the ranks: notebook and flow ask it before they start any.
    """
    problems = []
    if options.logs_to_mlflow:
        problems += tracking_problems("--mlflow-model-name", options.mlflow_model_name or None)
    if not is_main_process():  # the other ranks may see what rank 0 has already begun to write
        return problems
    for flag, folder, find in (
        ("--local-output-dir", options.local_output_dir, checks.output_problems),
        ("--dbfs-output-dir", options.dbfs_output_dir, _publishing_problems),
        ("--resume", options.resume, checks.resume_problems),
    ):
        if not (folder or "").strip():  # reported already, or not requested
            continue
        try:
            problems += find(options)
        except (OSError, RuntimeError, ValueError) as error:
            # a folder above it may not be entered, too long a name, ~nobody, links in a circle, a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            problems.append(f"{flag} {folder}: cannot be written ({reason}). Name a folder of your own")
    return problems


def _publishing_problems(options: TrainingOptions) -> list[str]:
    target, output = str(options.dbfs_output_dir), None
    if "://" not in target:
        local_path(target).resolve()  # raises where links go in a circle
    with suppress(OSError, RuntimeError, ValueError):  # reported of the local output
        output = local_path(options.local_output_dir or "").resolve()
    return [f"--dbfs-output-dir {problem}" for problem in target_problems(target, output)]


def prompt_problems(options: TrainingOptions) -> list[str]:
    """What is wrong with the file of --sample-prompts. Rank 0 reads it for all."""
    if not is_main_process() or not (options.sample_prompts or "").strip():
        return []
    try:
        read_prompts(str(options.sample_prompts))
    except DataError as error:
        return [f"--sample-prompts {error}"]
    return []


# --- the plan -----------------------------------------------------------------------------------------


def check_plan(settings: Settings, prepared: Prepared, decided: dict[str, Any] | None) -> Settings:
    """Decides what is "auto" by the plan of rank 0's machine. Raises OptionsError where the run does not fit.

    A resumed run keeps what was `decided` for it where "auto" is typed, or its numbers would change in their last
    digits. What a person types instead, because memory was short, is done.

    """
    here = on_this_host()
    return settings.decide(**on_rank_0(lambda: _decide(settings, prepared, here, decided or {})))


def _decide(
    settings: Settings, prepared: Prepared, ranks_here: int, decided: dict[str, Any]
) -> dict[str, Any]:
    """What the plan decides, on a machine with `ranks_here` of the ranks, also where each sees its own GPU alone."""
    from training.machine.local import this_machine
    from training.plan.epoch import lengths_of
    from training.plan.fit import plan_run
    from training.plan.lookup import model_shape

    if decided and settings.checkpointing == "auto":
        settings = replace(settings, checkpointing=decided["gradient_checkpointing"])
    if decided and settings.max_tokens == "auto":
        settings = replace(settings, max_tokens=decided["max_tokens_per_device"])
    options = settings.options
    # Each disk is checked for itself below.
    machine = replace(this_machine(settings.output), count=ranks_here, disk_gib=math.inf)
    lengths = lengths_of(
        options.training_dataset,
        *(prepared.train_rows[c][:] + prepared.held_out_rows[c][:] for c in ("length", "response_start")),
    )
    plan = plan_run(settings, lengths, model_shape(options.input_model), machine)
    problems = plan.problems + _disk_problems(options, plan)
    if problems and not options.force:
        raise OptionsError(*problems, "--force trains all the same: the plan may err by a tenth or more")
    for problem in problems:
        logger.warning("trained by --force, though the plan says %s", problem)
    logger.info(
        "the plan: %.2f GiB a device, checkpointing %s; an epoch in %s to %s, the run in %s to %s",
        sum(plan.gpu_memory_gib.values()),
        "on" if plan.settings.checkpointing else "off",
        *(
            duration(3600 * hours[bound])
            for hours in (plan.hours_per_epoch, plan.hours)
            for bound in ("low", "high")
        ),
    )
    return plan.settings.decided


def _disk_problems(options: TrainingOptions, plan: Plan) -> list[str]:
    """Which disks have too little free for what the plan says will be written on each; the rows are there already."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HOME

    output = local_path(options.local_output_dir)
    existing = sum(file.stat().st_size for file in output.glob("checkpoint-*/**/*") if file.is_file())
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    download = plan.model.downloaded and not any(
        isinstance(try_to_load_from_cache(options.input_model, file), str) for file in files
    )
    needs = {
        Path(HF_HOME): plan.model.file_bytes if download else 0,
        output / "checkpoints": max(0, int(plan.disk_gib["checkpoints"] * GIB) - existing),
        output / "model": int(plan.disk_gib["model"] * GIB),
    }
    labels = dict(zip(needs, ("the base model", "checkpoints", "the model"), strict=True))
    if options.dbfs_output_dir and "://" not in options.dbfs_output_dir:
        published = local_path(options.dbfs_output_dir)
        needs[published], labels[published] = needs[output / "model"], "its copy"
    return disk_problems(needs, labels)
