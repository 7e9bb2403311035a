"""Builds the record of a run (run.json), and finds the differences that would change the result of a resumed run."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
import uuid
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training.consts import INSTALLED
from training.data.source_names import joined, sources_of
from training.errors import OptionsError
from training.files import local_path
from training.model.base import base_difference, is_same_base
from training.options.settings import Settings
from training.options.trainer_options import SCHEDULES, TrainingOptions, flag_of
from training.storage import checkpoint
from training.storage.record import read_run_record
from training.storage.remote import newer_copies

logger = logging.getLogger(__name__)

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "peft",
    "bitsandbytes",
)

# Options that change what a step computes. Devices, memory and folders do not, except through the global batch. The
# number of steps does only if the learning rate depends on it.
COMPARED_OPTIONS = (
    "input_model",
    "seed",
    "lr",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "batching",
    "lora",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "quantize",
)


def new_record(
    settings: Settings,
    rows: str | None = None,
    base: dict[str, Any] | None = None,
    sources: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The record of a run before its first step.

    Its status is "running", later "stopped" (by SIGTERM or Ctrl-C) or "finished" (the model is written and verified).

    Args:
        rows: `rows_digest` of its rows.
        base: identifies the base model of an adapter (model/base.py); None without LoRA.
        sources: name, label, rows and held-out rows of each source, if there are several.
    """
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "status": "running",
        "id": uuid.uuid4().hex,  # stays the same when the run is resumed
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": asdict(settings.options),
        "world_size": settings.ranks,
        "global_batch": settings.global_batch,
        "precision": settings.precision,
        "rows": rows,
        **({"sources": sources} if sources else {}),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": git_commit(),
        **({} if base is None else {"base": base}),
    }


def recorded_test_size(options: TrainingOptions) -> int | None:
    """The number of held-out rows of the run that --resume continues, which keeps it; None for a run from step 0."""
    if options.resume == "never":
        return None
    is_named = options.resume != "auto"
    folder = Path(options.resume).resolve().parent if is_named else local_path(options.local_output_dir)
    copies = newer_copies(options.checkpoint_to, options.resume, folder)
    record = copies.record if copies else read_run_record(folder)
    if record is None:
        return None
    continues = copies or is_named or record["status"] == "finished" or "begun_from" in record
    if not continues and not checkpoint.any_complete(folder):
        return None
    number = record["options"].get("test_size")
    return number if isinstance(number, int) else None


def differences(former: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two records that would change the result of training, each with both values."""
    # A run that began before an option existed is like one with its default.
    defaults = {option.name: option.default for option in fields(TrainingOptions)}
    before, after = defaults | former["options"], now["options"]
    moved = is_same_base(former.get("base"), now.get("base"))
    names = [name for name in COMPARED_OPTIONS if not (moved and name == "input_model")]
    if SCHEDULES[after["lr_scheduler_type"]].decays:
        names += ["epochs", "max_steps"]
    found = [
        f"{flag_of(name)} was {before[name]}, but is now {after[name]}"
        for name in names
        if before[name] != after[name]
    ]
    if former.get("precision") != now["precision"]:
        found.append(f"the precision was {former.get('precision')}, but is now {now['precision']}")
    if former.get("global_batch") != now["global_batch"]:
        found.append(
            f"the global batch was {former.get('global_batch')} rows, but is now {now['global_batch']}"
            f"{_batch_advice(former.get('global_batch'), after, now['world_size'])}"
        )
    if other_base := base_difference(former.get("base"), now.get("base")):
        found.append(other_base)
    if former.get("rows") and now.get("rows") and former["rows"] != now["rows"]:
        found.append(_rows_difference(former, now))
    return found


def _rows_difference(former: dict[str, Any], now: dict[str, Any]) -> str:
    """What may be another than in the run that is resumed, if its rows are others."""
    before = former["options"].get("training_dataset", TrainingOptions.training_dataset)
    sources, typed = sources_of(before), sources_of(now["options"]["training_dataset"])
    if sources != typed and sorted(sources) == sorted(typed):
        return f"the sources of --training-dataset were in this order: {joined(sources)}"
    # Runs without this option are of a version that read rows in another way.
    earlier = (
        ""
        if "dataset_split" in former["options"]
        else ". An earlier version, as that of this run, also trained on blank inputs and instructions, and gave "
        "tokenizers such as Llama's other ids: finish the run with it, or start a new one"
    )
    return (
        "the rows differ: another --training-dataset or part of it, --test-size, --max-length or --keep-truncated, "
        f"another prompt (training/data/prompt.py), or the file has changed (it was {joined(sources)}){earlier}"
    )


def check_same_run(former: dict[str, Any], now: dict[str, Any], force: bool) -> None:
    """Raises OptionsError if the options would change the result of the run that is resumed; warns with `force`."""
    different = differences(former, now)
    if different and not force:
        raise OptionsError(
            "--resume with these options would not continue the same run:\n    "
            + "\n    ".join(different)
            + "\n    Type the options of that run, or a new --local-output-dir; --force continues with the new values"
        )
    for difference in different:
        logger.warning("--force: continuing although %s", difference)


def _batch_advice(rows: Any, options: dict[str, Any], world_size: int) -> str:
    """What to type for a global batch of `rows` again, if that is possible."""
    at_once = options["per_device_train_batch_size"] * world_size
    if not isinstance(rows, int) or rows % at_once:
        return ": --per-device-train-batch-size x --gradient-accumulation-steps x devices must stay the same"
    return f". Type --gradient-accumulation-steps {rows // at_once}"


def git_commit() -> str | None:
    """The commit of this repository; None in an installed wheel, or without git."""
    if INSTALLED:  # the environment may lie in the repository of another project
        return None
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
