"""Chooses the starting point of a run, step 0 or a complete checkpoint, and records it in run.json."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import LEDGER_FILE, RUN_FILE
from training.data.held_out import rows_digest
from training.errors import OptionsError
from training.model.base import identify
from training.options.checks import output_problems
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.ranks import is_main_process, on_rank_0
from training.run.adapter_checkpoint import read_facts
from training.run.fetch import FETCHED, fetch_newest
from training.run.identity import check_same_run, new_record
from training.run.lock import one_writer
from training.run.reshard import RESHARDED, reshard
from training.storage import checkpoint
from training.storage.copy import target_problems
from training.storage.record import read_run_record, write_run_record

if TYPE_CHECKING:
    from training.run.prepare import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The starting point of a run.

    Attributes:
        folder: the checkpoint; None for step 0.
        former: record of the run that is resumed.
        saved_ranks: number of ranks that wrote the checkpoint.
        finished: the run is complete, so nothing is trained.
        loaded: the folder to load: `folder`, or its copy converted for another number of ranks.
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
        """The checkpoint of the run's last step."""
        return self.folder if self.folder and self.step == steps else output / f"checkpoint-{steps}"

    @property
    def earlier_choices(self) -> dict[str, Any] | None:
        """The plan's choices for the run that is resumed."""
        return self.former.get("decided") if self.former else None


@contextmanager
def as_only_writer(output: Path) -> Iterator[None]:
    """Rank 0 locks the output folder. Raises FolderBusyError if another run holds it."""
    if not is_main_process():
        yield
        return
    with one_writer(output):
        yield


def find(settings: Settings, prepared: Prepared, steps: int) -> tuple[Start, dict[str, Any]]:
    """(start, record) of a run of `steps` steps. Raises OptionsError on every rank if rank 0 finds a problem."""
    options, output = settings.options, settings.output

    @cache
    def base() -> dict[str, Any] | None:
        return identify(options.input_model) if settings.lora else None

    def of_this_run() -> dict[str, Any]:
        digest = rows_digest(prepared.train_rows, prepared.held_out_rows)
        return new_record(settings, digest, base(), prepared.sources)

    def on_disk() -> tuple[Start, dict[str, Any]]:
        record = of_this_run()
        if problems := output_problems(options):  # another run may have ended in the meantime
            raise OptionsError(*problems)
        start = find_start(output, options, record, steps)
        if start.finished:
            assert start.former is not None
            return start, start.former
        _check_stage(start, settings)
        # A published copy of the shorter run is another model, and must not be replaced.
        if options.dbfs_output_dir and (problems := target_problems(options.dbfs_output_dir)):
            raise OptionsError(*(f"--dbfs-output-dir {problem}" for problem in problems))
        continued = start.former
        if start.folder is not None and start.folder.parent.resolve() != output.resolve():
            record["begun_from"] = str(start.folder)
            continued = read_run_record(output)  # another run than that of the checkpoint
        if continued is not None:
            record |= {name: continued[name] for name in ("started", "id") if name in continued}
        return start, record

    fetch_newest(settings, lambda former: check_same_run(former, of_this_run(), options.force))
    return on_rank_0(on_disk)


def write(settings: Settings, prepared: Prepared, start: Start, record: dict[str, Any], steps: int) -> Start:
    """Writes run.json and the ledger. Converts the checkpoint if the number of ranks has changed; returns the start."""
    output = settings.output

    def on_disk() -> Start:
        for name in (RESHARDED, FETCHED):  # left by a start that was killed
            shutil.rmtree(output / name, ignore_errors=True)
        loaded = start.folder
        changed = settings.deepspeed is not None and start.saved_ranks != settings.ranks
        if loaded and changed and start.step < steps:
            loaded = reshard(loaded, output)
        # run.json comes first: a folder with other files but without it is refused.
        write_run_record(output, record)
        prepared.ledger.save(output / LEDGER_FILE)
        return replace(start, loaded=loaded)

    return on_rank_0(on_disk)


def stopped(settings: Settings, record: dict[str, Any]) -> dict[str, Any]:
    """Records in run.json that a signal stopped the run."""
    record["status"] = "stopped"
    if is_main_process():
        write_run_record(settings.output, record)
    return record


def find_start(output: Path, options: TrainingOptions, now: dict[str, Any], steps: int) -> Start:
    """The checkpoint that `--resume` selects. Reads every byte of it and changes nothing.

    Args:
        now: the record of the new run.
        steps: total steps of that run.

    Raises OptionsError if there is no such checkpoint, or if the options would change the run's result.
    """
    if options.resume == "never":
        return Start()
    named = None if options.resume == "auto" else _named_checkpoint(options.resume, output)
    former = read_run_record(named.parent if named else output)
    if former is None:
        return _start_without_record(output, options, named)
    finished = former["status"] == "finished" and named is None
    if not named and not finished and not checkpoint.any_complete(output):
        _newest_intact(output, options)
        if "begun_from" not in former:
            logger.info("%s has no checkpoint yet: the run starts at step 0", output)
            return Start()
        named = Path(former["begun_from"])
        if problems := checkpoint.problems_of(named):
            raise OptionsError(
                f"--resume: the run in {output} has no checkpoint of its own yet, and the one it started from, "
                f"{named}, cannot be used: {problems[0]}. Restore it, or name a new --local-output-dir"
            )
    check_same_run(former, now, options.force)
    if finished and former["steps"] == steps and former["options"].get("final_model") == options.final_model:
        return Start(former=former, finished=True)
    folder = named or _newest_intact(output, options)
    if folder is None:
        raise OptionsError(
            f"--resume: {output} holds a finished model of {former['steps']} steps, but no checkpoint to continue "
            "from. Name a new --local-output-dir"
        )
    _check_resumable(folder, former, options, steps)
    progress = json.loads((folder / checkpoint.PROGRESS_FILE).read_text())
    return Start(folder, former, len(progress["loss_sums"]))


def _check_stage(start: Start, settings: Settings) -> None:
    """Raises OptionsError if DeepSpeed cannot load the checkpoint: ZeRO-3 divides the weights, ZeRO-1 and ZeRO-2 do not."""
    shards = [] if start.folder is None else list(start.folder.glob("global_step*/*model_states.pt"))
    if not shards:
        return
    divided = any(file.name.startswith("zero_pp_rank_") for file in shards)
    if divided != (settings.zero.stage == 3):
        former = (start.former or {}).get("options", {}).get("deepspeed") or "FILE"
        raise OptionsError(
            f"--resume: {start.folder} was written with {'ZeRO-3' if divided else 'ZeRO-1 or ZeRO-2'}, and "
            f"{settings.options.deepspeed_json} sets stage {settings.zero.stage}, which cannot load it. "
            f"Type --deepspeed {former}"
        )


def _start_without_record(output: Path, options: TrainingOptions, named: Path | None) -> Start:
    """Step 0 if the folder holds no run. Raises OptionsError if it holds one without a readable record."""
    if named:
        raise OptionsError(
            f"--resume {options.resume}: there is no {RUN_FILE} beside it. Name a checkpoint in the folder of its run"
        )
    if (output / RUN_FILE).exists() or checkpoint.checkpoints(output):
        raise OptionsError(
            f"--resume: {output / RUN_FILE} cannot be read, so the run is unknown and its files are kept. "
            "Name a new --local-output-dir"
        )
    return Start()


def _named_checkpoint(resume: str, output: Path) -> Path:
    """The checkpoint that --resume names. Raises OptionsError if it is damaged or newer ones would be lost."""
    named, output = Path(resume).resolve(), output.resolve()
    problems = ["it is not a checkpoint"]
    if named in checkpoint.checkpoints(named.parent):
        problems = checkpoint.problems_of(named)
    if problems:
        raise OptionsError(f"--resume {resume}: {problems[0]}. {checkpoint.resume_advice(named, output)}")
    others = [folder for folder in checkpoint.checkpoints(output) if folder != named]
    record = read_run_record(output)
    same_run = (
        record is not None and record.get("begun_from") == str(named) and not checkpoint.any_complete(output)
    )
    if named.parent != output and (others or record) and not same_run:
        raise OptionsError(
            f"--resume {resume}: {output} already holds another run. Type --resume auto to continue that one, "
            "or name a new --local-output-dir"
        )
    # An incomplete one is not protected: the run writes it again.
    complete = [folder for folder in others if (folder / checkpoint.MANIFEST_FILE).exists()]
    newer = [folder.name for folder in complete if checkpoint.step_of(folder) > checkpoint.step_of(named)]
    if newer:
        raise OptionsError(
            f"--resume {resume}: {output} has newer checkpoints ({', '.join(newer)}), which the run would overwrite. "
            "Name a new --local-output-dir, or remove them"
        )
    return named


def _newest_intact(output: Path, options: TrainingOptions) -> Path | None:
    """The newest checkpoint that matches its manifest byte for byte. The log names those it skips.

    Raises OptionsError if there are complete checkpoints and all of them are damaged.
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
        logger.warning("%s is skipped: %s%s", folder, problems[0], more)
    if damaged:
        new = (
            "--local-output-dir and a new --checkpoint-to" if options.checkpoint_to else "--local-output-dir"
        )
        raise OptionsError(
            f"--resume: every checkpoint in {output} is damaged ({'; '.join(damaged)}). "
            f"Restore the files, or name a new {new} to start at step 0"
        )
    return None


def _check_resumable(folder: Path, former: dict[str, Any], options: TrainingOptions, steps: int) -> None:
    """Raises OptionsError if a run with these options cannot continue, or end, at this checkpoint."""
    step, manifest = checkpoint.step_of(folder), checkpoint.read_manifest(folder)
    assert manifest is not None
    measured = manifest["eval_loss"] is not None
    sharded = any(folder.glob("global_step*"))
    if sharded != bool(options.deepspeed_json):
        written, missing = ("with", "Add") if sharded else ("without", "Leave out")
        raise OptionsError(
            f"--resume: {folder} was written {written} DeepSpeed. {missing} --deepspeed, and start it as before"
        )
    rank = (read_facts(folder) or {"rank": 0})["rank"]
    if rank != options.lora:
        written, missing = (
            (f"with --lora {rank}", f"Type --lora {rank}") if rank else ("without --lora", "Leave out --lora")
        )
        raise OptionsError(
            f"--resume: {folder} was written {written}, which --force cannot change. {missing}"
        )
    targets = former["options"].get("lora_targets", TrainingOptions.lora_targets)
    if rank and targets != options.lora_targets:
        raise OptionsError(
            f"--resume: {folder} was written with --lora-targets {targets}, which --force cannot change. "
            f"Type --lora-targets {targets}"
        )
    if step > steps or (step == steps and not measured):
        raise OptionsError(
            f"--resume: {folder} is at step {step}, and the run would end at {steps}. "
            f"Raise {'--max-steps' if options.max_steps else '--epochs'} to end at {step if measured else step + 1} or later"
        )
