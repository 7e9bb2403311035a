"""Makes a model folder from a checkpoint of a run, finished or not."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from training.consts import LEDGER_FILE, RUN_FILE
from training.data.ledger import Ledger
from training.errors import ModelError, OptionsError, first_line
from training.files import fill_folder, free_bytes, size_in_words, writable
from training.model.stored_weights import stored_weights
from training.model.verify import verify_model
from training.model.weight_files import empty_model, plan_files, write_files
from training.run.adapter_checkpoint import read_facts
from training.run.final_model import copy_files, weights_of
from training.run.merging import adapter_digests, merged_files
from training.run.model_card import outcome, write_model_card
from training.storage import checkpoint
from training.storage.record import read_run_record, write_run_record

logger = logging.getLogger(__name__)


def export(folder: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Writes the model of the checkpoint `folder` to the new folder `target`, and verifies it.

    The weight files are those that a finished run on as many ranks would write. The run's record and ledger beside the
    checkpoint give the model card and run.json. `target` appears when it is complete. Raises OptionsError for a folder
    that is no complete checkpoint and for an unusable target, ModelError if the model cannot be made.
    """
    folder = folder.resolve()
    if problems := [*checkpoint_problems(folder), *target_problems(target)]:
        raise OptionsError(*problems)
    target = target.resolve()
    manifest = _compared(folder)
    try:
        with fill_folder(target, last=RUN_FILE) as partial:
            weights = _write_weights(folder, manifest, partial, target, trust_remote_code)
            logger.info("verifying the model")
            _verify(partial, target, trust_remote_code)
            _describe(folder, partial, target, weights)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if checkpoint.read_manifest(folder) is None:
            raise OptionsError(_removed(folder)) from error
        if isinstance(error, ModelError):
            raise
        raise ModelError(_not_written(target, error)) from error
    logger.info("the model of %s is in %s", folder, target)


def _compared(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files match it. Raises OptionsError. A run may remove them meanwhile."""
    manifest, problems = checkpoint.read_manifest(folder), []
    if manifest is not None:
        size = sum(file["size"] for file in manifest["files"].values())
        logger.info("comparing %s of %s with their checksums", size_in_words(size), folder)
        try:
            problems = checkpoint.problems_of(folder)
        except OSError as error:
            problems = [f"it cannot be read ({first_line(error)})"]
    if manifest is None or checkpoint.read_manifest(folder) is None:
        raise OptionsError(_removed(folder))
    if problems:
        raise OptionsError(
            f"--checkpoint {folder}: {problems[0]}. {_other_checkpoint(folder.parent, folder)}"
        )
    return manifest


def _removed(folder: Path) -> str:
    return f"--checkpoint {folder}: it was removed meanwhile. {_other_checkpoint(folder.parent, folder)}"


def _verify(partial: Path, target: Path, trust_remote_code: bool) -> None:
    """Raises ModelError with the name that the model was to have."""
    try:
        verify_model(partial, trust_remote_code)
    except ModelError as error:
        raise ModelError(str(error).replace(str(partial), str(target))) from error


def _not_written(target: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return f"{target}: something else was written there meanwhile, and is kept. Name a new folder"
    room = ". Make room" if _is_full(error) else ""
    return f"{target}: the model could not be written ({first_line(error)}){room}"


def _is_full(error: Exception) -> bool:
    """Whether the disk or a quota is full. safetensors tells it in words."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {code}" in str(error) for code in full)


def checkpoint_problems(folder: Path) -> list[str]:
    """Why a folder is no complete checkpoint, with the checkpoint to name instead."""
    typed = f"--checkpoint {folder}"
    if checkpoint.is_checkpoint(folder):
        if checkpoint.read_manifest(folder) is not None:
            return []
        return [f"{typed}: it was not written to the end. {_other_checkpoint(folder.parent, folder)}"]
    if checkpoint.checkpoints(folder):
        return [f"{typed}: is the folder of a run, not a checkpoint. {_other_checkpoint(folder, folder)}"]
    return [f"{typed}: is not a checkpoint. Name a folder checkpoint-STEP of a run"]


def _other_checkpoint(output: Path, refused: Path) -> str:
    newest = checkpoint.newest_complete(output, but=refused)
    if newest is None:
        return f"{output} has no other complete checkpoint"
    return f"Type --checkpoint {shlex.quote(str(newest))}, the newest complete checkpoint there"


def target_problems(target: Path) -> list[str]:
    """Why the model cannot be written to `target`."""
    typed = f"--to {target}"
    if target.exists() and not target.is_dir():
        return [f"{typed}: is a file. Name a new folder"]
    if target.is_dir() and any(target.iterdir()):
        return [f"{typed}: is not empty. Name a new folder"]
    resolved = target.resolve()
    for folder in (resolved, *resolved.parents):
        named = checkpoint.FOLDER.fullmatch(folder.name)
        if named or os.path.isfile(folder / checkpoint.MANIFEST_FILE):  # unlike Path.is_file, it never raises
            return [f"{typed}: a run may remove {folder} as its checkpoint. Name a folder outside of it"]
    if not writable(target):
        return [f"{typed}: cannot be written. Name a folder of your own"]
    return []


def _write_weights(
    folder: Path, manifest: dict[str, Any], partial: Path, target: Path, trust_remote_code: bool
) -> dict[str, Any]:
    """Writes config, tokenizer and weights. Returns the digests of the weight files."""
    names = manifest["model"]
    if written := weights_of(names):  # without DeepSpeed, or by an earlier version
        _check_space(target, sum(manifest["files"][name]["size"] for name in names))
        copy_files(folder, names, partial)
        return {name: manifest["files"][name] for name in written}
    if not names:
        raise ModelError(f"{folder}: holds no config.json, so its model is unknown")
    copy_files(folder, names, partial)
    ranks = len(json.loads((folder / checkpoint.PROGRESS_FILE).read_text())["loss_sums"])
    run = read_run_record(_run_files(folder)) or {}
    shard = run.get("options", {}).get("max_shard_size", "5GB")
    lora = read_facts(folder) is not None
    if lora:
        place = (run.get("base") or {}).get("model")  # a resumed run may have found its base elsewhere
        plan = merged_files(folder, partial, shard, trust_remote_code, place)
    else:
        plan = plan_files(empty_model(folder, trust_remote_code), stored_weights(folder), ranks, shard)
    _check_space(target, plan.size)
    files = len(plan.files) or 1
    logger.info("writing %s in %d file%s", size_in_words(plan.size), files, "s" * (files > 1))
    return write_files(plan, partial) | (adapter_digests(partial) if lora else {})


def _run_files(folder: Path) -> Path:
    """The folder with the run's files: at --checkpoint-to they lie in the checkpoint."""
    return folder if (folder / RUN_FILE).is_file() else folder.parent


def _check_space(target: Path, needed: int) -> None:
    free = free_bytes(target)
    if free is not None and free < needed:
        raise ModelError(
            f"{target}: the model needs {size_in_words(needed)}, and {size_in_words(free)} are free. "
            "Make room, or name a folder on another disk"
        )


def _describe(folder: Path, partial: Path, target: Path, weights: dict[str, Any]) -> None:
    """Writes model card, run.json and ledger, if the checkpoint lies in the folder of its run or at --checkpoint-to."""
    run = _run_files(folder)
    record, ledger = read_run_record(run), run / LEDGER_FILE
    if record is None or not ledger.is_file():
        logger.warning("%s has no record of the run: the model has no card and no run.json", run)
        return
    try:
        record |= outcome(record, folder, folder) | {"weights": weights, "exported_from": str(folder)}
        write_model_card(partial, record, Ledger.read(ledger), name=target.name)
    except Exception as error:  # of many types: these files may be damaged, or of another version
        if _is_full(error):
            raise
        logger.warning(
            "the files of the run in %s cannot be used (%s): the model has no card and no run.json",
            run,
            first_line(error),
        )
        return
    shutil.copyfile(folder / "trainer_state.json", partial / "trainer_state.json")
    shutil.copyfile(ledger, partial / LEDGER_FILE)
    write_run_record(partial, record)
