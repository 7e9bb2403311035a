"""Checkpoint folders and their manifest. The manifest is written last, with the size and checksum of every file.

checkpoint-200/
  manifest.json          {"step": 200, "eval_loss": 1.23, "model": [name, ...],
                          "files": {name: {"size": bytes, "sha256": hex}, ...}, "sha256": of the entries above}
  config.json ...        config and tokenizer of the model, listed under "model"
  global_step200/        DeepSpeed's shards of weights and optimizer
  model*.safetensors     the weights of a run without DeepSpeed, also listed under "model"; its optimizer.pt
  trainer_state.json     all metrics logged so far
  progress.json          loss summed since the last log line
  rng_state*.pth, scheduler.pt"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.files import PARTIAL, file_digest, write_json

MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, complete or not, sorted by step."""
    return sorted(filter(is_checkpoint, output.glob("checkpoint-*")), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a folder `checkpoint-<step>`, complete or not."""
    return bool(re.fullmatch(r"checkpoint-\d+", folder.name)) and folder.is_dir()


def any_complete(output: Path) -> bool:
    """Whether a run has a checkpoint that was written to its end."""
    return any(map(read_manifest, checkpoints(output)))


def resume_advice(named: Path, output: Path) -> str:
    """What to type instead of --resume `named`, from which a run in `output` cannot continue."""
    run = named if checkpoints(named) else named.parent
    if run.resolve() == output.resolve():
        return "Type --resume auto for the newest complete checkpoint"
    complete = [folder for folder in checkpoints(run) if folder != named and read_manifest(folder)]
    if complete:
        return f"Type --resume {shlex.quote(str(complete[-1]))}, the newest complete checkpoint there"
    return "There is no complete checkpoint to continue from. Leave --resume out to begin at step 0"


def files_of(folder: Path) -> list[str]:
    """Sorted relative paths of all files in a checkpoint, without the manifest."""
    files = (file for file in folder.rglob("*") if file.is_file())
    names = (file.relative_to(folder).as_posix() for file in files)
    return sorted(name for name in names if name.removesuffix(PARTIAL) != MANIFEST_FILE)


def digests(folder: Path, names: Iterable[str], flush: bool = False) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hex}} of files. With `flush`, fsyncs them first."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
        found = pool.map(lambda name: file_digest(folder / name, flush=flush), names)
        return dict(zip(names, found, strict=True))


def write_manifest(
    folder: Path, eval_loss: float | None, model: list[str], files: dict[str, dict[str, Any]]
) -> None:
    """Completes a checkpoint. `model` names the files of the finished model; `files` comes from `digests`."""
    manifest = {"step": step_of(folder), "eval_loss": eval_loss, "model": model, "files": files}
    write_json(folder / MANIFEST_FILE, manifest | {"sha256": _checksum(manifest)})


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None if it is missing or damaged, which means that the checkpoint is incomplete."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return None
    intact = isinstance(manifest, dict) and manifest.pop("sha256", None) == _checksum(manifest)
    return manifest if intact and manifest["step"] == step_of(folder) else None


def problems_of(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Problems of a checkpoint, or of these files in it, one per file; [] if every byte is as written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return ["it was not written to the end"]
    written, existing = manifest["files"], set(files_of(folder))
    missing, resized, same_size = [], [], []
    for name in written if names is None else names:
        if name not in existing:
            missing.append(f"{name} is missing")
        elif (size := (folder / name).stat().st_size) != written[name]["size"]:
            resized.append(f"{name} has {size:,} bytes instead of {written[name]['size']:,}")
        else:
            same_size.append(name)
    changed = [name for name, found in digests(folder, same_size).items() if found != written[name]]
    return missing + resized + [f"{name} has changed since it was written" for name in changed]


def best(output: Path) -> Path | None:
    """The complete checkpoint with the lowest held-out loss, the newest if equal; None if none has a finite loss."""
    losses: dict[Path, float] = {}
    for folder in checkpoints(output):
        loss = (read_manifest(folder) or {}).get("eval_loss")
        if loss is not None and math.isfinite(loss):
            losses[folder] = loss
    return min(reversed(losses), key=losses.__getitem__, default=None)


def rotate(output: Path, limit: int, is_in_use: Callable[[Path], bool] = lambda folder: False) -> None:
    """Removes the oldest checkpoints beyond `limit` and incomplete ones before the newest complete one.

    Never removes the newest complete checkpoint or the best, nor one in use.
    """
    found = checkpoints(output)
    complete = [folder for folder in found if read_manifest(folder) is not None]
    if not complete:
        return
    incomplete = [folder for folder in found[: found.index(complete[-1])] if folder not in complete]
    keep = {complete[-1], best(output) or complete[-1]}
    surplus = max(0, len(complete) - max(limit, len(keep)))
    for folder in incomplete + [folder for folder in complete if folder not in keep][:surplus]:
        if not is_in_use(folder):
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint, the manifest first, so that a half-removed checkpoint never looks complete."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
