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
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.files import PARTIAL, file_digest, write_json

Losses = dict[int, float | None]  # held-out losses of complete checkpoints, by step

FOLDER = re.compile(r"checkpoint-(\d+)")  # name of a checkpoint's folder, with its step
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, complete or not, sorted by step."""
    return sorted(filter(is_checkpoint, output.glob("checkpoint-*")), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a folder `checkpoint-<step>`, complete or not."""
    return bool(FOLDER.fullmatch(folder.name)) and folder.is_dir()


def any_complete(output: Path) -> bool:
    """Whether a run has a checkpoint that was written to its end."""
    return any(map(read_manifest, checkpoints(output)))


def newest_complete(output: Path, but: Path | None = None) -> Path | None:
    """The newest checkpoint of a run that was written to its end, other than `but`."""
    complete = [folder for folder in checkpoints(output) if folder != but and read_manifest(folder)]
    return complete[-1] if complete else None


def export_advice(output: Path) -> str:
    """The sentence that makes a model from an unfinished run's newest checkpoint; "" if it has none."""
    newest = newest_complete(output)
    if newest is None:
        return ""
    words = ["python", "-m", "training.export", "--checkpoint", str(newest), "--to"]
    return f" To use the model of {newest.name}, type {shlex.join(words)} FOLDER"


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


def shares_of(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """The files of these `sizes` in `ranks` shares of about the same number of bytes.

    Each file, the largest first, goes to the share with the fewest bytes.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        emptiest = filled.index(min(filled))
        shares[emptiest].append(name)
        filled[emptiest] += sizes[name]
    return shares


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
    write_json(folder / MANIFEST_FILE, sealed(manifest))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own checksum, as it is written."""
    return manifest | {"sha256": _checksum(manifest)}


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None if it is missing or damaged, which means that the checkpoint is incomplete."""
    try:
        return parse_manifest((folder / MANIFEST_FILE).read_bytes(), step_of(folder))
    except OSError:
        return None


def parse_manifest(content: bytes, step: int) -> dict[str, Any] | None:
    """The manifest of the checkpoint of this step from the bytes of its file; None if they are damaged."""
    try:
        manifest = json.loads(content)
        intact = isinstance(manifest, dict) and manifest.pop("sha256", None) == _checksum(manifest)
    except (ValueError, RecursionError):
        return None
    return manifest if intact and _has_entries(manifest, step) else None


def _has_entries(manifest: dict[str, Any], step: int) -> bool:
    """Whether every entry is there and of its type: another program may write a file of this name."""
    model, files = manifest.get("model"), manifest.get("files")
    return (
        type(manifest.get("step")) is int
        and manifest["step"] == step
        and type(manifest.get("eval_loss", "")) in (float, int, type(None))
        and isinstance(files, dict)
        and all(isinstance(file, dict) and file.keys() == {"size", "sha256"} for file in files.values())
        and all(type(file["size"]) is int and type(file["sha256"]) is str for file in files.values())
        and isinstance(model, list)
        and all(isinstance(name, str) and name in files for name in model)
    )


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
    step = best_step(_losses(output))
    return None if step is None else output / f"checkpoint-{step}"


def best_step(losses: Losses) -> int | None:
    """The step with the lowest held-out loss, the newest if equal; None if none has a finite loss."""
    finite = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(sorted(finite, reverse=True), key=finite.__getitem__, default=None)


def surplus(losses: Losses, limit: int) -> list[int]:
    """The oldest of these steps beyond `limit`. The newest and the best always stay."""
    steps, best_of_all = sorted(losses), best_step(losses)
    keep = {*steps[-1:], *([] if best_of_all is None else [best_of_all])}
    count = max(0, len(steps) - max(limit, len(keep)))
    return [step for step in steps if step not in keep][:count]


def _losses(output: Path) -> Losses:
    manifests = {step_of(folder): read_manifest(folder) for folder in checkpoints(output)}
    return {step: manifest["eval_loss"] for step, manifest in manifests.items() if manifest is not None}


def rotate(output: Path, limit: int, is_in_use: Callable[[Path], bool] = lambda folder: False) -> None:
    """Removes the oldest checkpoints beyond `limit` and incomplete ones before the newest complete one.

    Never removes the newest complete checkpoint or the best, nor one in use.
    """
    losses = _losses(output)
    if not losses:
        return
    removed = surplus(losses, limit)
    for folder in checkpoints(output):
        step = step_of(folder)
        incomplete = step not in losses and step < max(losses)
        if (incomplete or step in removed) and not is_in_use(folder):
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint, the manifest first, so that a half-removed checkpoint never looks complete.

    Of a link only the link is removed. A file in the place of the folder is removed as well.
    """
    if stands_in_the_way(folder) or folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    with suppress(IsADirectoryError):  # a folder of this name never counts as a manifest
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def stands_in_the_way(folder: Path) -> bool:
    """Whether something other than a folder has the name of this checkpoint."""
    return os.path.lexists(folder) and not folder.is_dir()
