"""Fetches the newest checkpoint from --checkpoint-to for a run whose machine or disk is gone. All ranks share the bytes.

A checkpoint's shards are pickles, which can run any code. So nothing is loaded before its SHA-256 was compared, and only
you may be able to write the target.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.errors import OptionsError, PublishError
from training.files import SCRATCH, duration, free_bytes, size_in_words, write_json
from training.options.settings import Settings
from training.ranks import in_parallel, on_rank_0, rank, world_size
from training.storage import checkpoint, remote

logger = logging.getLogger(__name__)

FETCHED = f"{SCRATCH}fetched"  # folder in the output folder for a checkpoint that is being fetched


def fetch_newest(settings: Settings, check_same_run: Callable[[dict[str, Any]], None]) -> None:
    """Fetches the newest intact checkpoint into the output folder, if the target has a newer one. All ranks call it.

    Args:
        check_same_run: raises OptionsError if this run would not continue the run with this record.

    Raises OptionsError if the options differ, the target cannot be read, or all of its checkpoints are damaged.
    """
    options, output = settings.options, settings.output
    if options.resume != "auto" or not options.checkpoint_to:
        return

    def find() -> list[dict[str, Any]]:
        copies = remote.newer_copies(options.checkpoint_to, options.resume, output, compared=True)
        if copies is None:
            return []
        check_same_run(copies.record)
        return copies.manifests

    damaged = []
    for manifest in on_rank_0(find):
        problem = _fetch(options.checkpoint_to, output, manifest)
        if problem is None:
            return
        damaged.append(problem)
        logger.warning("%s/%s is skipped", options.checkpoint_to, problem)
    if damaged and not on_rank_0(lambda: checkpoint.any_complete(output)):
        raise OptionsError(
            f"--checkpoint-to {options.checkpoint_to}: every checkpoint there is damaged ({'; '.join(damaged)}). "
            "Restore the files, or name a new folder to start at step 0"
        )


def _fetch(name: str, output: Path, manifest: dict[str, Any]) -> str | None:
    """Fetches a checkpoint with the files of its run. Returns what is damaged; then nothing is changed."""
    step, partial = manifest["step"], output / FETCHED
    files = {
        f"checkpoint-{step}/{file}": d
        for part in ("files", "run_files")
        for file, d in manifest[part].items()
    }
    size = sum(file["size"] for file in files.values())
    begin = time.monotonic()

    def make_room() -> None:
        outside = [file for file in files if not _is_inside(file)]
        if outside:
            raise OptionsError(
                f"--checkpoint-to {name}: the manifest names a file outside its folder, {outside[0]}"
            )
        shutil.rmtree(partial, ignore_errors=True)
        free = free_bytes(output)
        if free is not None and free < size:
            raise OptionsError(
                f"--local-output-dir {output}: {size_in_words(size)} are needed to fetch checkpoint-{step} from {name}, "
                f"and {size_in_words(free)} are free. Make room, or name a folder on a larger disk"
            )
        logger.info("fetching checkpoint-%s from %s: %s", step, name, size_in_words(size))
        partial.mkdir(parents=True)

    on_rank_0(make_room)
    shares = checkpoint.shares_of({file: digest["size"] for file, digest in files.items()}, world_size())

    def fetch_share() -> list[str]:
        try:
            target, _ = remote.open_store(name)

            def fetch(file: str) -> str | None:
                return remote.fetch_file(target, file, partial / file, files[file])

            with ThreadPoolExecutor(remote.FILES_AT_ONCE) as pool:
                return [problem for problem in pool.map(fetch, shares[rank()]) if problem]
        except PublishError as error:
            raise OptionsError(f"--checkpoint-to {error}. Type the same command again") from error

    problems = [problem for of_rank in in_parallel(fetch_share) for problem in of_rank]
    on_rank_0(lambda: None if problems else _place(output, manifest))
    if problems:
        return problems[0]
    logger.info(
        "checkpoint-%s fetched in %s, every checksum compared", step, duration(time.monotonic() - begin)
    )
    return None


def _is_inside(name: str) -> bool:
    """Whether a file of a checkpoint has a plain name, with which it stays in its folder."""
    return not {"", ".", ".."} & set(name.split("/"))


def _place(output: Path, manifest: dict[str, Any]) -> None:
    """Moves the fetched files to their places, run.json first: a folder with other files but without it is refused."""
    name = f"checkpoint-{manifest['step']}"
    fetched = output / FETCHED / name
    for file in manifest["run_files"]:
        os.replace(fetched / file, output / file)
    write_json(fetched / checkpoint.MANIFEST_FILE, checkpoint.sealed(remote.without_run(manifest)))
    checkpoint.remove(output / name)  # an incomplete one
    os.replace(fetched, output / name)
    shutil.rmtree(output / FETCHED, ignore_errors=True)
