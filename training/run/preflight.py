"""Checks this machine against the options and the plan before anything expensive."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HOME

from training.consts import GIB
from training.errors import OptionsError
from training.files import disk_problems, local_path
from training.machine.environment import version_problems
from training.machine.kernels import kernel_problems
from training.machine.local import this_machine
from training.options.deepspeed import read_deepspeed_json
from training.options.trainer_options import TrainingOptions
from training.plan.epoch import lengths_of
from training.plan.fit import Plan, plan_run
from training.plan.lookup import model_facts
from training.run.operators import compiler_problems
from training.run.prepare import Prepared
from training.tracking.progress import duration

logger = logging.getLogger(__name__)


def machine_problems(options: TrainingOptions) -> list[str]:
    """What this machine lacks: versions, kernels of its GPUs, a compiler. Not what depends on model and data."""
    problems = version_problems() + kernel_problems()
    if options.deepspeed_json and not problems:
        with suppress(OptionsError):  # an unreadable file is told by find_problems
            problems += compiler_problems(read_deepspeed_json(options.deepspeed_json))
    return problems


def check_plan(
    options: TrainingOptions,
    prepared: Prepared,
    ranks_here: int,
    decided: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What "auto" comes to on this machine, by the plan. Raises OptionsError where the run does not fit.

    `ranks_here` is how many of the run's ranks share this machine, also where each of them sees its own GPU alone.

    A run that goes on keeps what was `decided` for it where "auto" is asked, or its numbers would change in their last
    digits; what a person types instead, because memory did not suffice, is done.
    """
    if decided and options.gradient_checkpointing == "auto":
        kept = "on" if decided["gradient_checkpointing"] else "off"
        options = replace(options, gradient_checkpointing=kept)
    if decided and options.max_tokens_per_device == "auto":
        options = replace(options, max_tokens_per_device=decided["max_tokens_per_device"])
    world = prepared.args.world_size
    # Each disk is asked for itself below.
    machine = replace(this_machine(prepared.args.output_dir), count=ranks_here, disk_gib=math.inf)
    lengths = lengths_of(
        options.training_dataset,
        *(prepared.train_rows[c][:] + prepared.held_out_rows[c][:] for c in ("length", "response_start")),
    )
    plan = plan_run(options, world, lengths, model_facts(options.input_model), machine)
    problems = plan.problems + _disk_problems(options, plan)
    if problems and not options.force:
        raise OptionsError(*problems, "--force trains all the same: the plan may err by a tenth or more")
    for fault in problems:
        logger.warning("trained by --force, though the plan says %s", fault)
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
    return {
        "gradient_checkpointing": plan.settings.checkpointing,
        "max_tokens_per_device": plan.settings.max_tokens,
    }


def _disk_problems(options: TrainingOptions, plan: Plan) -> list[str]:
    """Which disks have too little free for what the plan says will be written on each; the rows are there already."""
    output = local_path(options.local_output_dir)
    there = sum(file.stat().st_size for file in output.glob("checkpoint-*/**/*") if file.is_file())
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    download = plan.model.downloaded and not any(
        isinstance(try_to_load_from_cache(options.input_model, file), str) for file in files
    )
    needs = {
        Path(HF_HOME): plan.model.file_bytes if download else 0,
        output / "checkpoints": max(0, int(plan.disk_gib["checkpoints"] * GIB) - there),
        output / "model": int(plan.disk_gib["model"] * GIB),
    }
    labels = dict(zip(needs, ("the base model", "checkpoints", "the model"), strict=True))
    if options.dbfs_output_dir and "://" not in options.dbfs_output_dir:
        published = local_path(options.dbfs_output_dir)
        needs[published], labels[published] = needs[output / "model"], "its copy"
    return disk_problems(needs, labels)
