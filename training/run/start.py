"""Chooses the starting point of a run: step 0 or a complete checkpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.consts import RUN_FILE
from training.errors import OptionsError
from training.options.checks import output_problems
from training.options.trainer_options import TrainingOptions
from training.run.identity import differences
from training.storage import checkpoint
from training.storage.record import read_run_record
from training.storage.target import target_problems

logger = logging.getLogger(__name__)


@dataclass
class Start:
    """Where a run begins. `former` is the record of the run that it continues, `saved_ranks` how many ranks that had;
    `finished` says that nothing is left to do."""

    folder: Path | None = None
    former: dict[str, Any] | None = None
    saved_ranks: int | None = None
    finished: bool = False

    @property
    def step(self) -> int:
        return 0 if self.folder is None else checkpoint.step_of(self.folder)


def find_start(output: Path, options: TrainingOptions, now: dict[str, Any], steps: int) -> Start:
    """The checkpoint that `--resume` means. Reads every byte of it, and changes nothing.

    Args:
        now: the record of the run to come.
        steps: how many that run will have done in the end.

    Raises OptionsError where there is none, or where the options would make another run of it.
    """
    if options.resume == "never":
        return Start()
    given = None if options.resume == "auto" else _given(options.resume, output)
    former = read_run_record(given.parent if given else output)
    if former is None:
        if given:
            raise OptionsError(
                f"--resume {options.resume}: there is no {RUN_FILE} beside it, so it is of no run"
            )
        if (output / RUN_FILE).exists() or checkpoint.checkpoints(output):
            raise OptionsError(
                f"--resume: {output / RUN_FILE} cannot be read, so nobody can tell which run this is, and nothing of "
                "it shall be lost. Name a new --local-output-dir"
            )
        return Start()
    finished = former["status"] == "finished" and given is None
    if not given and not finished and not has_complete(output):
        _newest_whole(output)
        if "begun_from" not in former:
            logger.info("%s has no checkpoint yet: the run begins anew", output)
            return Start()
        given = Path(former["begun_from"])
        if problems := checkpoint.problems_of(given):
            raise OptionsError(
                f"--resume: the run in {output} was begun from {given}, and has no checkpoint of its own yet; of that "
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
    folder = given or _newest_whole(output)
    if folder is None:
        raise OptionsError(
            f"--resume: {output} holds a finished model of {former['steps']} steps, and no checkpoint to go on from. "
            "Name a new --local-output-dir"
        )
    _check_fit(folder, options, steps)
    progress = json.loads((folder / checkpoint.PROGRESS_FILE).read_text())
    return Start(folder, former, len(progress["loss_sums"]))


def _given(resume: str, output: Path) -> Path:
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


def remove_newer(output: Path, step: int) -> None:
    """Removes what a run that goes on from `step` will write again: torn checkpoints, and those passed over."""
    for folder in checkpoint.checkpoints(output):
        if checkpoint.step_of(folder) > step:
            checkpoint.remove(folder)


def begin(output: Path, options: TrainingOptions, record: dict[str, Any], steps: int) -> Start:
    """Where the run begins. Raises OptionsError also for what was told of its places before, and has changed since."""
    if problems := output_problems(options):  # another run may have come to its end while this one waited
        raise OptionsError(*problems)
    start = find_start(output, options, record, steps)
    # The copy of the finished run that this one goes on from is another model's.
    if (
        options.dbfs_output_dir
        and not start.finished
        and (problems := target_problems(options.dbfs_output_dir))
    ):
        raise OptionsError(*[f"--dbfs-output-dir {fault}" for fault in problems])
    return start
