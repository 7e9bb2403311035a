"""Writes the finished model into the output folder. All ranks write at once, each its own files.

It depends on files only, so a later command can repeat it if this one is killed.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training.consts import EVALUATION_FILE, WEIGHTS
from training.errors import ModelError, TrainingError, first_line
from training.files import PARTIAL
from training.model.stored_weights import stored_weights
from training.model.weight_files import INDEX, empty_model, plan_files, write_files
from training.options.settings import Settings
from training.ranks import broadcast, gather, is_main_process, rank, world_size
from training.run.failures import lost_peer, out_of_memory
from training.run.merging import adapter_digests, merged_files
from training.storage import checkpoint

LISTING_SECONDS = 90  # more than NFS keeps a listing (acdirmax of nfs(5))
UNFINISHED = f"model{PARTIAL}"  # folder in the output folder, while the model is written


def chosen_checkpoint(settings: Settings, last: Path) -> Path:
    """The checkpoint that becomes the model: the last, or the best by held-out loss."""
    if settings.options.final_model == "best":
        return checkpoint.best(settings.output) or last
    return last


def write_final_model(settings: Settings, last: Path) -> tuple[Path, dict[str, Any]]:
    """Writes the model of the chosen checkpoint to the output folder. All ranks call it, after the last step.

    Returns the checkpoint and {name of a weight file: {"size": bytes, "sha256": hex}}. Raises TrainingError on all ranks.
    """
    unset_hf_deepspeed_config()  # or transformers would shard the empty model over the ranks
    if settings.lora:
        # Or the trained model, which is in reference cycles, would stay in memory beside the base that is loaded again.
        gc.collect()
    output, main = settings.output, is_main_process()
    chosen = chosen_checkpoint(settings, last) if main else None
    # From rank 0: on shared storage the ranks may see other files for a while.
    chosen, manifest = broadcast((chosen, chosen and checkpoint.read_manifest(chosen)))
    assert manifest is not None, f"{chosen} is not complete"
    names = manifest["model"]
    # The last one was compared when it was written, or when the run started from it.
    compared = list(manifest["files"]) if chosen != last and not weights_of(names) else names
    share = sorted(compared)[rank() :: world_size()]
    _on_all_ranks(chosen, output, partial(_compare, chosen, manifest["files"], share))
    unfinished = output / UNFINISHED
    _on_all_ranks(chosen, output, partial(copy_files, chosen, names, unfinished) if main else None)
    if weights_of(names):
        digests = {name: manifest["files"][name] for name in weights_of(names)}
    elif settings.lora:
        merge = partial(_write_merged, settings, chosen, unfinished)
        [digests, *_] = _on_all_ranks(chosen, output, merge if main else None)
    else:
        shares = _on_all_ranks(chosen, output, partial(_write_share, settings, chosen, unfinished))
        digests = {name: share[name] for share in shares for name in sorted(share)}
    placed: list[str] = []
    if main and settings.lora:  # rank 0 has written all of them
        placed = checkpoint.files_of(unfinished)
    elif main:  # by name: NFS may not yet list what other ranks have written
        placed = sorted({*names, *digests, *([INDEX] if (unfinished / INDEX).exists() else [])})
    _on_all_ranks(chosen, output, partial(place_files, unfinished, output, placed) if main else None)
    return chosen, dict(sorted(digests.items()))


def weights_of(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(WEIGHTS)]


def _on_all_ranks(chosen: Path, output: Path, function: Callable[[], Any] | None) -> list[Any]:
    """Runs each rank's `function` and returns all results. A problem of one rank is raised as TrainingError on all."""
    result, problem = None, None
    try:
        result = function() if function else None
    except TrainingError as error:
        problem = str(error)
    except ModelError as error:
        problem = f"its last step, {checkpoint.step_of(chosen)}: {error}"
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if lost_peer(error) or out_of_memory(error):
            raise
        problem = (
            f"its last step: the model of {chosen} could not be placed in {output} ({first_line(error)}). Make room, and "
            "type the same command with --resume auto"
        )
    of_ranks = gather((result, problem))
    for _, problem in of_ranks:
        if problem is not None:
            raise TrainingError(problem)
    return [result for result, _ in of_ranks]


def _compare(chosen: Path, files: Iterable[str], names: list[str]) -> None:
    """Compares `names`, of all `files` of the checkpoint, with their checksums. Raises TrainingError."""
    if world_size() > 1:
        _wait_for_files(chosen, files)
    if problems := checkpoint.problems_of(chosen, names):
        raise TrainingError(
            f"its last step: the model in {chosen} cannot be used, because {problems[0]}. Remove that folder, and "
            "type the same command with --resume auto"
        )


def _wait_for_files(chosen: Path, files: Iterable[str]) -> None:
    """Waits until this node sees the files of all ranks: NFS may list a folder as it was up to a minute ago."""
    end = time.monotonic() + LISTING_SECONDS
    while time.monotonic() < end and (
        checkpoint.read_manifest(chosen) is None or not set(files) <= set(checkpoint.files_of(chosen))
    ):
        time.sleep(1)


def copy_files(chosen: Path, names: list[str], unfinished: Path) -> None:
    """Copies a checkpoint's files to the unfinished model. Weights are hard links if possible, which cost no disk."""
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
    unfinished.mkdir()
    for name in names:
        file = unfinished / name
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not name.endswith(WEIGHTS):  # a file that a user may edit must not be a link
                raise OSError
            os.link(chosen / name, file)
        except OSError:
            shutil.copyfile(chosen / name, file)


def _write_share(settings: Settings, chosen: Path, unfinished: Path) -> dict[str, Any]:
    """Writes this rank's weight files of the model. Returns their digests."""
    options = settings.options
    plan = plan_files(
        empty_model(chosen, options.trust_remote_code),
        stored_weights(chosen),
        world_size(),
        options.max_shard_size,
    )
    return write_files(plan, unfinished, rank(), world_size())


def _write_merged(settings: Settings, chosen: Path, unfinished: Path) -> dict[str, Any]:
    """Writes the merged model of a LoRA run. Returns the digests of its weight files."""
    options = settings.options
    plan = merged_files(
        chosen, unfinished, options.max_shard_size, options.trust_remote_code, options.input_model
    )
    return write_files(plan, unfinished) | adapter_digests(unfinished)


def place_files(unfinished: Path, output: Path, names: Iterable[str]) -> None:
    """Moves the written model into the output folder."""
    for old in output.glob(f"*{WEIGHTS}*"):  # of a shorter run, maybe with more shards
        old.unlink()
    (output / EVALUATION_FILE).unlink(missing_ok=True)  # of the model that is replaced
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished / name, output / name)
    shutil.rmtree(unfinished)
