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
from training.data.prompt_files import read_prompts
from training.data.rows import source_problems
from training.data.source_names import joined
from training.errors import DataError, OptionsError
from training.evaluate.metrics import missing_extra
from training.files import disk_problems, duration, local_path, path_problem
from training.machine import kernels
from training.machine.environment import lora_package_problems, version_problems
from training.options import checks, deepspeed_checks
from training.options.deepspeed import read_json
from training.options.reporting import trackers_of
from training.options.settings import Settings, resolve
from training.options.trainer_options import TrainingOptions, flag_of
from training.ranks import gather, is_main_process, on_rank_0, ranks_on_this_host, world_size
from training.storage import checkpoint
from training.storage.copy import target_problems
from training.storage.remote import store_problems
from training.tracking.tracker import tracker_modules

if TYPE_CHECKING:
    from training.plan.fit import Plan
    from training.run.prepare import Prepared

logger = logging.getLogger(__name__)


def check(options: TrainingOptions, typing_errors: Sequence[str] = ()) -> Settings:
    """The run's settings. Raises OptionsError with every problem of options and machine.

    `typing_errors` are values that the command line could not parse. If there are any, checks that need torch are
    skipped, so that the answer to a typing error does not wait for its import.
    """
    problems, config = [*typing_errors, *checks.option_problems(options)], None
    settings: Settings | None = None
    if options.deepspeed_json and not checks.path_problems(options).keys() & {
        "deepspeed",
        "deepspeed_config",
    }:
        try:
            config = read_json(options.deepspeed_json)
        except OptionsError as error:
            problems += error.problems
    problems += deepspeed_checks.launch_problems(options)
    if config is not None:
        problems += deepspeed_checks.file_problems(options, config, world_size())
    contradictions = deepspeed_checks.precision_problems(options, config or {})
    problems += contradictions
    problems += dataset_problems(options) + prompt_problems(options)
    problems += destination_problems(options) + version_problems()
    problems += evaluation_problems(options)
    problems += lora_package_problems(options.lora > 0, options.quantize is not None)
    problems += deepspeed_checks.quantize_problems(options, world_size())
    if not typing_errors:
        problems += _machine_problems(config)
        readable = config is not None or not options.deepspeed_json
        if not contradictions and (readable or options.bf16 or options.fp16):
            settings = resolve(options, world_size(), kernels.best_precision(), config if readable else {})
            problems += kernels.precision_problems(settings.precision)
    if problems or settings is None:
        raise OptionsError(*problems)
    return settings


def evaluation_problems(options: TrainingOptions) -> list[str]:
    """The problem that --evaluate lacks a package."""
    missing = missing_extra("rouge_score") if options.evaluate else []
    return [f"--evaluate: {problem}, or leave it out" for problem in missing]


def _machine_problems(config: dict[str, Any] | None) -> list[str]:
    """What this machine lacks: kernels for its GPUs, a compiler, one rank for each GPU."""
    problems = kernels.kernel_problems()
    if config is not None and not problems and not version_problems():
        from training.run.operators import compiler_problems

        problems += compiler_problems(config)
    return problems + kernels.device_problems()


def destination_problems(options: TrainingOptions) -> list[str]:
    """Why the results cannot be written to the output folder, the published copy or the trackers.

    It does not depend on the ranks, so notebook and flow call it before they start any.
    """
    problems: list[str] = []
    if not is_main_process():  # the others log nothing, and may already see files of rank 0
        return problems
    for tracker in tracker_modules(trackers_of(options)):
        problems += tracker.problems(options)
    unusable = checks.path_problems(options)  # reported by option_problems
    for name, find in (
        ("local_output_dir", checks.output_problems),
        ("dbfs_output_dir", _publishing_problems),
        ("checkpoint_to", _copying_problems),
        ("resume", _resume_problems),
    ):
        folder = getattr(options, name) or ""
        if name in unusable or not folder.strip():  # reported already, or not requested
            continue
        try:
            problems += find(options)
        except OSError as error:  # a parent that cannot be entered
            problems.append(
                f"{flag_of(name)} {folder}: cannot be written ({error.strerror}). Name a folder of your own"
            )
    return problems


def _resume_problems(options: TrainingOptions) -> list[str]:
    """A problem if --resume names no folder, or the folder of a run instead of a checkpoint's."""
    if options.resume in ("never", "auto"):
        return []
    folder = Path(options.resume)
    if not folder.is_dir():
        return [f"--resume {folder}: no such folder. Type never, auto, or the folder of a checkpoint"]
    if checkpoint.is_checkpoint(folder.resolve()):
        return []
    advice = checkpoint.resume_advice(folder, local_path(options.local_output_dir or ""))
    return [f"--resume {folder}: is not the folder of a checkpoint. {advice}"]


def _publishing_problems(options: TrainingOptions) -> list[str]:
    target, output = str(options.dbfs_output_dir), None
    with suppress(OSError, RuntimeError, ValueError):  # reported for --local-output-dir
        output = local_path(options.local_output_dir or "").resolve()
    return [f"--dbfs-output-dir {problem}" for problem in target_problems(target, output)]


def _copying_problems(options: TrainingOptions) -> list[str]:
    target = str(options.checkpoint_to)
    if options.dbfs_output_dir and target.rstrip("/") == options.dbfs_output_dir.rstrip("/"):
        return [
            f"--checkpoint-to {target}: is the same folder as --dbfs-output-dir, which holds the model. Name another folder"
        ]
    problems = store_problems(target, local_path(options.local_output_dir or ""), options.resume)
    return [f"--checkpoint-to {problem}" for problem in problems]


def dataset_problems(options: TrainingOptions) -> list[str]:
    """Problems of the rows' sources: a file is missing, one is named twice, --dataset-split would be ignored."""
    sources = options.training_dataset
    usable = [name for name in sources if checks.is_utf8(name) and not path_problem(name, "dataset")]
    # A source that is reported already may be the one on the Hub, to which the selection belongs.
    selection = options.dataset_selection if len(usable) == len(sources) else {}
    return [f"--training-dataset {problem}" for problem in source_problems(usable, selection)]


def prompt_problems(options: TrainingOptions) -> list[str]:
    """Problems of the file of --sample-prompts. Only rank 0 reads it."""
    if not is_main_process() or not (options.sample_prompts or "").strip():
        return []
    if "sample_prompts" in checks.path_problems(options):
        return []
    try:
        read_prompts(str(options.sample_prompts))
    except DataError as error:
        return [f"--sample-prompts {error}"]
    return []


# --- the plan -----------------------------------------------------------------------------------------


def check_plan(
    settings: Settings, prepared: Prepared, earlier: dict[str, Any] | None, taken_gib: Sequence[float]
) -> Settings:
    """Replaces "auto" by the plan for rank 0's machine. Raises OptionsError if the run does not fit.

    A resumed run replaces "auto" by the `earlier` choices, because other choices would change the last digits of its
    losses. Typed values override them.

    `taken_gib` is `gpu_memory_taken_gib` from before this rank's CUDA context. The GPU with the least free memory counts.
    """
    ranks_here = ranks_on_this_host()
    taken = max(gather(taken_gib[prepared.args.device.index or 0] if taken_gib else 0.0))
    return settings.with_plan_choices(
        **on_rank_0(lambda: _plan_choices(settings, prepared, ranks_here, taken, earlier or {}))
    )


def _plan_choices(
    settings: Settings, prepared: Prepared, ranks_here: int, taken: float, earlier: dict[str, Any]
) -> dict[str, Any]:
    """The plan's choices for a machine with `ranks_here` ranks, even if each rank sees only its own GPU.

    `taken` GiB of each GPU are used by other processes.
    """
    import torch

    from training.machine.local import this_machine
    from training.plan.epoch import row_lengths
    from training.plan.fit import plan_run, with_packing
    from training.plan.lookup import model_shape

    if earlier:
        settings = _with_earlier_choices(settings, earlier)
    options = settings.options
    # _disk_problems checks each disk on its own.
    gpus = [taken] * torch.cuda.device_count()
    machine = replace(this_machine(settings.output, taken_gib=gpus), count=ranks_here, disk_gib=math.inf)
    lengths = row_lengths(
        joined(options.training_dataset),
        prepared.train_rows["length"][:] + prepared.held_out_rows["length"][:],
        prepared.ledger.response_tokens,
    )
    model = with_packing(model_shape(options.input_model, options.trust_remote_code), prepared.packing)
    if model.downloaded and _is_cached(options.input_model):
        model = replace(model, downloaded=False)
    plan = plan_run(settings, lengths, model, machine)
    problems = plan.problems + _disk_problems(options, plan)
    if problems and not options.force:
        raise OptionsError(*problems, "or type --force to train anyway: the plan may be off by 10% or more")
    for problem in problems:
        logger.warning("--force: training although the plan says %s", problem)
    if plan.warning:
        logger.warning("%s", plan.warning)
    _log_plan(plan)
    return plan.settings.plan_choices


def _with_earlier_choices(settings: Settings, earlier: dict[str, Any]) -> Settings:
    """The settings of a resumed run: the choices that its plan made earlier, in place of "auto"."""
    if settings.checkpointing == "auto":
        settings = replace(settings, checkpointing=earlier["gradient_checkpointing"])
    if settings.max_tokens == "auto":
        settings = replace(settings, max_tokens=earlier["max_tokens_per_device"])
    # A run that recorded no choice began before blocks were handled as a whole.
    settings = replace(settings, whole_blocks=earlier.get("whole_blocks", False))
    if settings.packed and earlier.get("batching") == "length":
        settings = settings.without_packing()
    return settings


def _log_plan(plan: Plan) -> None:
    if not plan.settings.background_saves:
        logger.info("training waits for each checkpoint, because host memory is too small for copies")
    logger.info(
        "the plan: %.2f GiB a device, checkpointing %s; the run in %s to %s; its steps take %s of %s",
        sum(plan.gpu_memory_gib.values()),
        "on" if plan.settings.checkpointing else "off",
        *(duration(3600 * plan.hours[bound]) for bound in ("low", "high")),
        duration(plan.run_seconds["steps"]),
        duration(3600 * plan.hours["expected"]),
    )


def _is_cached(model: str) -> bool:
    """Whether a model of the Hub has been downloaded to this machine."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(model, file), str) for file in files)


def _disk_problems(options: TrainingOptions, plan: Plan) -> list[str]:
    """Disks with too little free space for the base model, the checkpoints, the model and its copy."""
    from huggingface_hub.constants import HF_HOME

    output = local_path(options.local_output_dir)
    existing = sum(file.stat().st_size for file in output.glob("checkpoint-*/**/*") if file.is_file())
    needs = {
        Path(HF_HOME): plan.model.file_bytes if plan.model.downloaded else 0,
        output / "checkpoints": max(0, int(plan.disk_gib["checkpoints"] * GIB) - existing),
        output / "model": int(plan.disk_gib["model"] * GIB),
    }
    labels = dict(zip(needs, ("the base model", "checkpoints", "the model"), strict=True))
    larger = "name a --local-output-dir on a larger disk"
    fewer = "lower --save-total-limit" if options.save_total_limit > 1 else larger
    remedies = dict(zip(needs, ("type export HF_HOME=/a/larger/disk", fewer, larger), strict=True))
    if options.dbfs_output_dir and "://" not in options.dbfs_output_dir:
        published = local_path(options.dbfs_output_dir)
        needs[published], labels[published] = needs[output / "model"], "its copy"
        remedies[published] = "name another --dbfs-output-dir"
    return disk_problems(needs, labels, remedies)
