"""Copies complete checkpoints to --checkpoint-to in the background, while the run trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import SourceError
from training.files import duration, size_in_words
from training.options.settings import Settings
from training.ranks import is_main_process
from training.run.failures import StopRequest
from training.storage import checkpoint, remote
from training.storage.target import Target

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds before a failed copy is tried again; each pause doubles
# Wait for a copy after a signal: launchers kill 30 s after it, and the run has saved before.
STOP_SECONDS = 10.0
STALLED_SECONDS = 300.0  # without a byte, the end of a run no longer waits


class Mirror:
    """A thread that copies checkpoints of the run in `output`, the newest first. Its errors are warnings.

    It copies what is newest when it is free, then the best. So it skips checkpoints if it is slower than the run.

    Args:
        name: the target as the user typed it.
        record: the record of the run (run.json).
        step: the starting point of the run, then its newest copy. Later checkpoints at the target cannot be used, and are
            removed.
        limit: checkpoints to keep at the target.

    Attributes:
        busy: the checkpoint that is being copied.
    """

    def __init__(self, name: str, output: Path, record: dict[str, Any], step: int, limit: int) -> None:
        self.name, self.output, self.record, self.step, self.limit = name, output, record, step, limit
        self.busy: Path | None = None
        self._target: Target | None = None
        self._attempt = ""
        self._copies: dict[int, dict[str, Any]] = {}  # manifests at the target, by step
        self._given_up: list[dict[str, Any]] = []  # manifests of checkpoints that cannot be read
        # {name: digest}: the files of the checkpoint that is copied, and those of them that are at the target.
        self._files: dict[str, Any] = {}
        self._copied: dict[str, Any] = {}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._moved = time.monotonic()
        self._problem = ""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def wake(self, folder: Path) -> None:
        """Says that this checkpoint is complete."""
        self._wake.set()

    def is_copying(self, folder: Path) -> bool:
        """Whether this checkpoint must not be removed now."""
        return folder == self.busy

    def close(self, seconds: float | None) -> None:
        """Waits for the copies, at most `seconds`, or as long as bytes move. Logs what is not copied."""
        self._closing.set()
        self._wake.set()
        begin = time.monotonic()
        if seconds != 0 and self._thread.is_alive() and (folder := self._next()):
            logger.info("waiting for the copy of %s to %s", folder.name, self.name)
        while self._thread.is_alive():
            since = max(begin, self._moved) if seconds is None else begin
            limit = STALLED_SECONDS if seconds is None else seconds
            if time.monotonic() - since >= limit:
                break
            self._thread.join(0.1)
        if folder := self._next():
            reason = self._problem or "the copy took longer than the run could wait"
            newest = f"checkpoint-{max(self._copies)}" if self._copies else "no checkpoint"
            logger.warning(
                "%s is not copied to %s (%s); %s is complete there", folder.name, self.name, reason, newest
            )

    # --- the thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause = 0.0
        while True:
            last_try = self._closing.is_set()
            try:
                self._copy_all()
                pause = 0.0
            except remote.SupersededError as error:
                self._problem = str(error)
                logger.warning("%s. This attempt copies no more checkpoints; training continues", error)
                return
            except Exception as error:  # each file system has its own; none may end the training
                if not pause:
                    logger.warning("%s. Training continues, and the copy is tried again", error)
                self._problem = str(error)
                pause = min(2 * pause or FIRST_PAUSE, LONGEST_PAUSE)
            if last_try:
                return
            if pause:
                self._closing.wait(pause)
            else:
                self._wake.wait()
                self._wake.clear()

    def _copy_all(self) -> None:
        try:
            self._copy_missing()
        except remote.LostTargetError as error:
            logger.warning("%s. The target is opened again", error)
            self._target = None
            self._copy_missing()
        if self._problem:
            logger.info("%s: all checkpoints are copied again", self.name)
            self._problem = ""

    def _copy_missing(self) -> None:
        if self._target is None:
            self._connect()
        while folder := self._next():
            self._copy(folder)

    def _connect(self) -> None:
        target, existing = remote.open_store(self.name, self.output)
        copies = remote.complete_checkpoints(target, existing)
        foreign = [step for step, copy in copies.items() if copy.get("run") != self.record["id"]]
        if foreign:
            raise remote.SupersededError(
                f"{self.name}: holds checkpoints of another run (checkpoint-{max(foreign)}), which are kept"
            )
        self._attempt = remote.begin_attempt(target, self.record["id"], self._attempt)
        for step in remote.steps_in(existing):
            if step > self.step or step not in copies:
                copies.pop(step, None)
                remote.remove_checkpoint(target, step)
        self._files, self._copied = {}, {}
        self._copies, self._target = copies, target

    def _next(self) -> Path | None:
        """The checkpoint to copy: the newest complete one, then the best; None if both are at the target."""
        complete = {f: m for f in checkpoint.checkpoints(self.output) if (m := checkpoint.read_manifest(f))}
        if not complete:
            return None
        for folder in dict.fromkeys([max(complete, key=checkpoint.step_of), checkpoint.best(self.output)]):
            manifest = complete.get(folder) if folder else None
            if folder is None or manifest is None or manifest in self._given_up:
                continue
            copy = self._copies.get(checkpoint.step_of(folder))
            if copy is None or remote.without_run(copy) != manifest:
                return folder
        return None

    def _copy(self, folder: Path) -> None:
        assert self._target is not None
        self.busy = folder
        manifest = checkpoint.read_manifest(folder)
        if manifest is None:  # just removed
            self.busy = None
            return
        begin, step = time.monotonic(), checkpoint.step_of(folder)
        former = self._copies.pop(step, None)
        if former and former["files"] == manifest["files"]:  # only its held-out loss was added
            self._copied = dict(former["files"])
        elif self._files != manifest["files"]:
            self._copied = {}
        self._files = manifest["files"]
        try:
            self._copies[step] = remote.copy_checkpoint(
                self._target, folder, manifest, self.record, self._copied, self._attempt, self._note
            )
        except SourceError as error:
            self._given_up.append(manifest)
            logger.warning("%s is not copied: %s", folder.name, error)
            return
        finally:
            self.busy = None
        self.step = max(self.step, step)
        size = sum(file["size"] for file in manifest["files"].values())
        seconds = time.monotonic() - begin
        logger.info(
            "%s copied to %s: %s in %s", folder.name, self.name, size_in_words(size), duration(seconds)
        )
        self._rotate()

    def _note(self, block: bytes) -> None:
        self._moved = time.monotonic()

    def _rotate(self) -> None:
        """Removes surplus checkpoints from the target by the rule of the run's folder, and incomplete ones."""
        assert self._target is not None
        existing = remote.check_attempt(self._target, self._attempt, self.record["id"])
        losses = {step: manifest["eval_loss"] for step, manifest in self._copies.items()}
        incomplete = [step for step in remote.steps_in(existing) if step not in losses]
        for step in checkpoint.surplus(losses, self.limit) + incomplete:
            self._copies.pop(step, None)
            remote.remove_checkpoint(self._target, step)


@contextmanager
def copying(
    settings: Settings, record: dict[str, Any], step: int, request: StopRequest
) -> Iterator[Mirror | None]:
    """Copies the checkpoints of a run that starts at `step`, as long as the context lasts. Only rank 0 copies.

    At the end it waits for the last copy; after a signal only for a moment, after an error not at all.
    """
    options = settings.options
    if not options.checkpoint_to or not is_main_process():
        yield None
        return
    mirror = Mirror(options.checkpoint_to, settings.output, record, step, options.save_total_limit)
    try:
        yield mirror
    except BaseException:
        mirror.close(STOP_SECONDS if request.received else 0)
        raise
    mirror.close(STOP_SECONDS if request.received else None)
