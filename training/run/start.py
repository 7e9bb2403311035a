"""Chooses the starting point of a run, step 0 or a complete checkpoint, and writes down what was chosen."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import LEDGER_FILE, RUN_FILE
from training.errors import OptionsError
from training.options.checks import output_problems
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.ranks import is_main_process, on_rank_0
from training.run.identity import differences, new_record, rows_digest
from training.run.lock import one_writer
from training.run.resume import RESHARDED, reshard
from training.storage import checkpoint
from training.storage.record import read_run_record, write_run_record
from training.storage.target import target_problems

if TYPE_CHECKING:
    from training.run.prepare import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: the checkpoint; None for step 0.
        former: record of the run that is resumed.
        saved_ranks: ranks that wrote the checkpoint.
        finished: nothing is left to do.
        loaded: what is loaded in place of `folder`, cut for another number of ranks.
    """

    folder: Path | None = None
    former: dict[str, Any] | None = None
    saved_ranks: int | None = None
    finished: bool = False
    loaded: Path | None = None

    @property
    def step(self) -> int:
        return 0 if self.folder is None else checkpoint.step_of(self.folder)

    def last_checkpoint(self, output: Path, steps: int) -> Path:
        """The checkpoint of the run's last step, once that is done."""
        return self.folder if self.folder and self.step == steps else output / f"checkpoint-{steps}"

    @property
    def decided(self) -> dict[str, Any] | None:
        """What the plan decided for the run that is resumed."""
        return self.former.get("decided") if self.former else None


@contextmanager
def as_only_writer(output: Path) -> Iterator[None]:
    """Holds the output folder, on rank 0 for all. Raises FolderBusyError where another run holds it."""
    if not is_main_process():
        yield
        return
    with one_writer(output):
        yield


def find(settings: Settings, prepared: Prepared, steps: int) -> tuple[Start, dict[str, Any]]:
    """(start, record) of a run of `steps` steps. Raises OptionsError on every rank for what is wrong on rank 0."""
    options, output = settings.options, settings.output

    def on_disk() -> tuple[Start, dict[str, Any]]:
        record = new_record(settings, rows_digest(prepared.train_rows, prepared.held_out_rows))
        if problems := output_problems(options):  # another run may have come to its end while this one waited
            raise OptionsError(*problems)
        start = find_start(output, options, record, steps)
        if start.finished:
            assert start.former is not None
            return start, start.former
        # The copy of the finished run that this one goes on from is another model's.
        if options.dbfs_output_dir and (problems := target_problems(options.dbfs_output_dir)):
            raise OptionsError(*(f"--dbfs-output-dir {problem}" for problem in problems))
        if start.former is not None:
            record |= {name: start.former[name] for name in ("started", "id") if name in start.former}
        if start.folder is not None and start.folder.parent.resolve() != output.resolve():
            record["begun_from"] = str(start.folder)
        return start, record

    return on_rank_0(on_disk)


def write(settings: Settings, prepared: Prepared, start: Start, record: dict[str, Any], steps: int) -> Start:
    """Writes run.json and the ledger. Returns the start, its checkpoint cut anew where the number of ranks has changed."""
    output = settings.output

    def on_disk() -> Start:
        shutil.rmtree(output / RESHARDED, ignore_errors=True)  # a start that was killed may have left it
        loaded = start.folder
        changed = settings.deepspeed is not None and start.saved_ranks != settings.ranks
        if loaded and changed and start.step < steps:
            loaded = reshard(loaded, output)
        # The first file of all: a folder that has others and not this one is refused.
        write_run_record(output, record)
        prepared.ledger.save(output / LEDGER_FILE)
        return replace(start, loaded=loaded)

    return on_rank_0(on_disk)


def stopped(settings: Settings, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that a signal has ended, written down."""
    record["status"] = "stopped"
    if is_main_process():
        write_run_record(settings.output, record)
    return record


def find_start(output: Path, options: TrainingOptions, now: dict[str, Any], steps: int) -> Start:
    """The checkpoint that `--resume` means. Reads every byte of it, and changes nothing.

    Args:
        now: the record of the run to come.
        steps: how many that run will have done in the end.

    Raises OptionsError where there is none, or where the options would make another run of it.
    """
    if options.resume == "never":
        return Start()
    named = None if options.resume == "auto" else _named(options.resume, output)
    former = read_run_record(named.parent if named else output)
    if former is None:
        return _without_record(output, options, named)
    finished = former["status"] == "finished" and named is None
    if not named and not finished and not has_complete(output):
        _newest_whole(output)
        if "begun_from" not in former:
            logger.info("%s has no checkpoint yet: the run begins anew", output)
            return Start()
        named = Path(former["begun_from"])
        if problems := checkpoint.problems_of(named):
            raise OptionsError(
                f"--resume: the run in {output} was begun from {named}, and has no checkpoint of its own yet; of that "
                f"one {problems[0]}. Restore it, or name a new --local-output-dir"
            )
    different = differences(former, now)
    if different and not options.force:
        raise OptionsError(
            "--resume would not give the run that was begun:\n    "
            + "\n    ".join(different)
            + "\n    Type the former options, or another --local-output-dir; --force continues all the same"
        )
    for difference in different:
        logger.warning("continued by --force, though %s", difference)
    if finished and former["steps"] == steps and former["options"].get("final_model") == options.final_model:
        return Start(former=former, finished=True)
    folder = named or _newest_whole(output)
    if folder is None:
        raise OptionsError(
            f"--resume: {output} holds a finished model of {former['steps']} steps, and no checkpoint to go on from. "
            "Name a new --local-output-dir"
        )
    _check_fit(folder, options, steps)
    progress = json.loads((folder / checkpoint.PROGRESS_FILE).read_text())
    return Start(folder, former, len(progress["loss_sums"]))


def _without_record(output: Path, options: TrainingOptions, named: Path | None) -> Start:
    """Step 0, where there is nothing to resume. Raises OptionsError where there is, but no record says what."""
    if named:
        raise OptionsError(f"--resume {options.resume}: there is no {RUN_FILE} beside it, so it is of no run")
    if (output / RUN_FILE).exists() or checkpoint.checkpoints(output):
        raise OptionsError(
            f"--resume: {output / RUN_FILE} cannot be read, so nobody can tell which run this is, and nothing of "
            "it shall be lost. Name a new --local-output-dir"
        )
    return Start()


def _named(resume: str, output: Path) -> Path:
    """The checkpoint that --resume names, whole and with none after it that the run would run into."""
    given, output = Path(resume).expanduser().resolve(), output.resolve()
    problems = ["it is no checkpoint"]
    if given in checkpoint.checkpoints(given.parent):
        problems = checkpoint.problems_of(given)
    if problems:
        raise OptionsError(
            f"--resume {resume}: {problems[0]}. Type --resume auto for the newest that is whole"
        )
    others = [each for each in checkpoint.checkpoints(output) if each != given]
    there = read_run_record(output)
    begun = there is not None and there.get("begun_from") == str(given) and not has_complete(output)
    if given.parent != output and (others or there) and not begun:
        raise OptionsError(
            f"--resume {resume}: {output} holds a run of its own. Type --resume auto to go on with that, "
            "or name a new --local-output-dir"
        )
    # A torn one is in nobody's way: it is written anew.
    written = [each for each in others if (each / checkpoint.MANIFEST_FILE).exists()]
    newer = [each.name for each in written if checkpoint.step_of(each) > checkpoint.step_of(given)]
    if newer:
        raise OptionsError(
            f"--resume {resume}: {output} has newer checkpoints ({', '.join(newer)}), which the run would run into. "
            "Name a new --local-output-dir, or remove them"
        )
    return given


def has_complete(output: Path) -> bool:
    return any(map(checkpoint.read_manifest, checkpoint.checkpoints(output)))


def _newest_whole(output: Path) -> Path | None:
    """The newest checkpoint whose every byte is right; those passed over are named in the log.

    Raises OptionsError where there are complete ones, and all of them have been damaged since.
    """
    damaged = []
    for folder in reversed(checkpoint.checkpoints(output)):
        problems = checkpoint.problems_of(folder)
        if not problems:
            return folder
        if (folder / checkpoint.MANIFEST_FILE).is_file():
            if checkpoint.read_manifest(folder) is None:
                problems = [f"{checkpoint.MANIFEST_FILE} has changed since it was written"]
            damaged.append(f"{folder.name}: {problems[0]}")
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        logger.warning("%s is passed over: %s%s", folder, problems[0], more)
    if damaged:
        raise OptionsError(
            f"--resume: no checkpoint in {output} is whole ({'; '.join(damaged)}). "
            "Restore the file, or name a new --local-output-dir to begin anew"
        )
    return None


def _check_fit(folder: Path, options: TrainingOptions, steps: int) -> None:
    """Raises OptionsError if a run with these options cannot go on, or end, at this checkpoint."""
    step, manifest = checkpoint.step_of(folder), checkpoint.read_manifest(folder)
    assert manifest is not None
    measured = manifest["eval_loss"] is not None
    sharded = any(folder.glob("global_step*"))
    if sharded != bool(options.deepspeed_json):
        written, missing = ("with", "Add") if sharded else ("without", "Leave out")
        raise OptionsError(
            f"--resume: {folder} was written {written} DeepSpeed. {missing} --deepspeed, and start it as before"
        )
    if step > steps or (step == steps and not measured):
        raise OptionsError(
            f"--resume: {folder} is at step {step}, and the run would end at {steps}. "
            f"Raise --epochs or --max-steps to end at {step if measured else step + 1} or later"
        )
