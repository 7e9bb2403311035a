"""Checkpoints at a target that outlives the machine: S3, DBFS, a Volume or any folder.

TARGET/
  attempt-2-9f3a61c0.json   {"run": id, "host": name, "since": time}; only the attempt with the highest name writes
  checkpoint-400/
    <the checkpoint's files>
    run.json, metrics.jsonl, samples.jsonl    of the run, as they were when the checkpoint was copied
    manifest.json           last: the checkpoint's, with "run": id and "run_files": {name: {"size", "sha256"}}

Every file is written once, front to back, and checked. Files are never renamed or changed, which mounted stores refuse.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from training.consts import LEDGER_FILE, METRICS_FILE, RUN_FILE, SAMPLES_FILE
from training.errors import OptionsError, PublishError
from training.files import digest, read_blocks
from training.storage import checkpoint
from training.storage.record import read_run_record
from training.storage.target import (
    MARKER_FILE,
    Target,
    as_publish_error,
    list_files,
    open_target,
    try_writing,
)
from training.storage.write import remove_file, write_checked

ATTEMPT = re.compile(r"attempt-(\d+)-[0-9a-f]{8}\.json")
RUN_FILES = (RUN_FILE, LEDGER_FILE, METRICS_FILE, SAMPLES_FILE)  # a resume continues them
FILES_AT_ONCE = 4  # copied or fetched in parallel, each front to back


class SupersededError(PublishError):
    """The target belongs to a newer attempt of the run, or to another run."""


class LostTargetError(PublishError):
    """The target is not the one that the attempt opened: it was removed, or another was mounted in its place."""


def open_store(name: str, output: Path | None = None) -> tuple[Target, dict[str, int | None]]:
    """(target, its files and folders) for the checkpoints of the run in `output`.

    Raises PublishError if it cannot be read, or holds anything that is not a copy of checkpoints.
    """
    target = open_target(name, None)
    if output is not None and isinstance(target.fs, LocalFileSystem):
        ours, other = output.resolve(), Path(target.path).resolve()
        if ours == other or ours in other.parents or other in ours.parents:
            raise PublishError(
                f"{name}: is the run's own folder {output}, or one of the two is inside the other. Name another folder"
            )
    existing = list_files(target)
    existing.pop(MARKER_FILE, None)  # of `try_writing`, if it could not be removed
    foreign = sorted(n for n in existing if not (ATTEMPT.fullmatch(n) or checkpoint.FOLDER.fullmatch(n)))
    if not foreign and not _attempts(existing):
        # A target that was away may come back without its attempt's file. Then it holds copies alone.
        copies = complete_checkpoints(target, existing)
        of_a_run = {f"checkpoint-{step}" for step, manifest in copies.items() if "run" in manifest}
        foreign = sorted(set(existing) - of_a_run)
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise PublishError(
            f"{name}: holds something else than a run's checkpoints ({names}). Name a new folder"
        )
    return target, existing


def store_problems(name: str, output: Path | None, resume: str) -> list[str]:
    """Reasons why a run cannot copy its checkpoints to the target; [] if there are none. It tries to write there."""
    try:
        target, existing = open_store(name, output)
        found = complete_checkpoints(target, existing)
        if not isinstance(target.fs, LocalFileSystem):  # `open_target` has tried a local folder
            try_writing(target)
    except PublishError as error:
        return [str(error)]
    if found and resume != "auto" and not _is_past_of(resume, output, found):
        which = "another run" if resume == "never" else f"another run than {resume}, or newer ones"
        return [
            f"{name}: holds checkpoints of {which} (the newest is checkpoint-{max(found)}). Type --resume auto to "
            "continue that run, or name a new folder"
        ]
    if resume == "never" and (attempts := _attempts(existing)):
        return [
            f"{name}: another run has begun to copy its checkpoints there ({max(attempts, key=_order)}). Name a new "
            "folder, or remove that file if the run has ended"
        ]
    return []


def _is_past_of(resume: str, output: Path | None, found: dict[int, dict[str, Any]]) -> bool:
    """Whether a run in `output` that resumes its own checkpoint `resume` has copied all of these checkpoints before."""
    named = Path(resume).resolve()
    if output is None or named.parent != output.resolve() or not checkpoint.is_checkpoint(named):
        return False
    own = (read_run_record(output) or {}).get("id")
    return max(found) <= checkpoint.step_of(named) and all(copy.get("run") == own for copy in found.values())


# --- what is there ------------------------------------------------------------------------------------


def complete_checkpoints(target: Target, existing: dict[str, int | None]) -> dict[int, dict[str, Any]]:
    """{step: manifest} of the checkpoints that were copied to their end. Raises PublishError."""
    found = {}
    for step in steps_in(existing):
        name = f"checkpoint-{step}/{checkpoint.MANIFEST_FILE}"
        with as_publish_error(f"{target.name}/{name}: cannot be read"):
            try:
                content = target.fs.cat_file(target.file(name))
            except FileNotFoundError:
                continue
        if manifest := checkpoint.parse_manifest(content, step):
            found[step] = manifest
    return found


def steps_in(existing: dict[str, int | None]) -> list[int]:
    """The sorted steps of all checkpoint folders, complete or not."""
    return sorted(int(match[1]) for match in map(checkpoint.FOLDER.fullmatch, existing) if match)


def without_run(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it is in the run's folder."""
    return {key: value for key, value in manifest.items() if key not in ("run", "run_files")}


def read_record(target: Target, manifest: dict[str, Any]) -> dict[str, Any]:
    """The run.json beside a copied checkpoint. Raises PublishError."""
    name = f"checkpoint-{manifest['step']}/{RUN_FILE}"
    with as_publish_error(f"{target.name}/{name}: cannot be read"):
        content = target.fs.cat_file(target.file(name))
        if digest([content]) != manifest["run_files"].get(RUN_FILE):
            raise PublishError(f"{target.name}/{name}: has changed since it was written")
        return json.loads(content)


@dataclass(frozen=True)
class Copies:
    """Checkpoints at the target that are newer than those in the output folder.

    Attributes:
        manifests: of the checkpoints, the newest first.
        record: the record of their run.
    """

    manifests: list[dict[str, Any]]
    record: dict[str, Any]


def newer_copies(name: str | None, resume: str, output: Path, compared: bool = False) -> Copies | None:
    """The checkpoints at --checkpoint-to that `--resume auto` would rather take than those in `output`; None without any.

    With `compared`, a checkpoint of an unfinished run counts in `output` only if every byte is as written.
    Only rank 0 calls it. Raises OptionsError if the target cannot be read or holds another run's checkpoints: a run that
    could continue must not begin anew.
    """
    if resume != "auto" or not name:
        return None
    try:
        target, existing = open_store(name, output)
        found = complete_checkpoints(target, existing)
        if not found:
            return None
        record = read_record(target, found[max(found)])
    except PublishError as error:
        raise OptionsError(
            f"--checkpoint-to {error}. The run may have checkpoints there, so --resume auto does not start at step 0"
        ) from error
    complete = filter(checkpoint.read_manifest, checkpoint.checkpoints(output))
    own_steps = sorted(map(checkpoint.step_of, complete), reverse=True)
    former = read_run_record(output) or {}
    started = own_steps or former.get("status") == "finished" or "begun_from" in former
    if started and former.get("id") != record.get("id"):
        raise OptionsError(
            f"--checkpoint-to {name}: holds checkpoints of another run, started {record.get('started')}, "
            f"than {output}, started {former.get('started')}. Name a new folder"
        )
    compared = compared and former.get("status") != "finished"
    intact = (n for n in own_steps if not compared or not checkpoint.problems_of(output / f"checkpoint-{n}"))
    newest = next(intact, -1)
    newer = sorted((step for step in found if step > newest), reverse=True)
    return Copies([found[step] for step in newer], record) if newer else None


def fetch_file(target: Target, name: str, file: Path, expected: dict[str, Any]) -> str | None:
    """Copies a file from the target to a local disk. Returns what is wrong with its content; None if it is as `expected`.

    Raises PublishError if it cannot be read or written.
    """
    size, checksum = 0, hashlib.sha256()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as copy:
            for block in _blocks_of(target, name, expected["size"]):
                copy.write(block)
                size += len(block)
                checksum.update(block)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:
        raise PublishError(f"{file}: cannot be written ({error.strerror})") from error
    if size != expected["size"]:
        return f"{name} has {size:,} bytes instead of {expected['size']:,}"
    return None if checksum.hexdigest() == expected["sha256"] else f"{name} has changed since it was written"


def _blocks_of(target: Target, name: str, size: int) -> Iterator[bytes]:
    problem = f"{target.name}/{name}: cannot be read"
    with as_publish_error(problem):
        stream = target.fs.open(target.file(name), "rb")
    with stream:
        blocks = read_blocks(stream, size)
        while True:
            with as_publish_error(problem):
                block = next(blocks, b"")
            if not block:
                return
            yield block


# --- writing ------------------------------------------------------------------------------------------


def begin_attempt(target: Target, run: str, former: str = "") -> str:
    """Makes this process the newest attempt, whose copies alone count. Returns its name. Raises PublishError.

    `former` is the attempt of the same process at a target that was lost, and may come back.
    """
    if not target.in_bucket:
        with as_publish_error(f"{target.name}: cannot be created"):
            target.fs.makedirs(target.path, exist_ok=True)
    earlier = _attempts(list_files(target))
    number = 1 + max((_order(name)[0] for name in [*earlier, former] if name), default=0)
    own = f"attempt-{number}-{uuid.uuid4().hex[:8]}.json"
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = json.dumps({"run": run, "host": socket.gethostname(), "since": since}).encode() + b"\n"
    write_checked(target, own, content, digest([content]), lambda block: None)
    for name in earlier:  # an earlier attempt that still writes finds the newer name
        remove_file(target, name)
    return own


def check_attempt(target: Target, own: str, run: str) -> dict[str, int | None]:
    """The files of the target. Raises SupersededError if a newer attempt, of this `run` or another one, has begun to write
    there, or LostTargetError.
    """
    existing = list_files(target)
    newest = max(_attempts(existing), key=_order, default=own)
    if _order(newest) > _order(own):
        with as_publish_error(f"{target.name}/{newest}: cannot be read"):
            writer = json.loads(target.fs.cat_file(target.file(newest))).get("run")
        whose = "a newer attempt of this run" if writer == run else "another run"
        raise SupersededError(f"{target.name}: {whose} writes its checkpoints there ({newest})")
    if own not in existing:
        raise LostTargetError(f"{target.name}: {own}, the file of this attempt, is gone")
    return existing


def _attempts(existing: Iterable[str]) -> list[str]:
    return [name for name in existing if ATTEMPT.fullmatch(name)]


def _order(attempt: str) -> tuple[int, str]:
    """Attempts that chose the same number at the same time are ordered by the random part of their names."""
    return int(attempt.split("-")[1]), attempt


def copy_checkpoint(
    target: Target,
    folder: Path,
    manifest: dict[str, Any],
    run: dict[str, Any],
    copied: dict[str, Any],
    attempt: str,
    on_block: Callable[[bytes], None],
) -> dict[str, Any]:
    """Copies a complete checkpoint, its manifest last. Returns the manifest at the target.

    Args:
        manifest: of the checkpoint in `folder`.
        run: the record of the run (run.json).
        copied: {name: digest} of the files that an interrupted copy of it has written and checked; it grows.
        attempt: of `begin_attempt`.

    Raises SupersededError, LostTargetError, SourceError if a file of the checkpoint is missing or has changed, or PublishError.
    """
    place = folder.name
    beside = {
        name: (folder.parent / name).read_bytes() for name in RUN_FILES if (folder.parent / name).is_file()
    }
    sources: dict[str, Path | bytes] = {name: folder / name for name in manifest["files"]} | beside
    run_files = {name: digest([content]) for name, content in beside.items()}
    missing = {n: d for n, d in (manifest["files"] | run_files).items() if copied.get(n) != d}

    def copy(name: str) -> None:
        check_attempt(target, attempt, run["id"])
        _make_parent(target, f"{place}/{name}")
        write_checked(target, f"{place}/{name}", sources[name], missing[name], on_block)
        copied[name] = missing[name]

    remove_file(target, f"{place}/{checkpoint.MANIFEST_FILE}")
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        try:
            for done in [pool.submit(copy, name) for name in missing]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    written = manifest | {"run": run["id"], "run_files": run_files}
    content = json.dumps(checkpoint.sealed(written), indent=2).encode() + b"\n"
    check_attempt(target, attempt, run["id"])
    write_checked(target, f"{place}/{checkpoint.MANIFEST_FILE}", content, digest([content]), on_block)
    return written


def _make_parent(target: Target, name: str) -> None:
    if not target.in_bucket:
        parent = str(PurePosixPath(target.file(name)).parent)
        with as_publish_error(f"{target.name}/{name}: cannot be written"):
            target.fs.makedirs(parent, exist_ok=True)


def remove_checkpoint(target: Target, step: int) -> None:
    """Removes a checkpoint from the target, its manifest first. Raises PublishError."""
    place = f"checkpoint-{step}"
    remove_file(target, f"{place}/{checkpoint.MANIFEST_FILE}")
    with as_publish_error(f"{target.name}/{place}: cannot be removed"):
        target.fs.invalidate_cache()
        with suppress(FileNotFoundError):  # a bucket has no empty folders
            target.fs.rm(target.file(place), recursive=True)
