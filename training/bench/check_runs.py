"""Lines of the GPU check that run the demo to its end: save, verify, and resume on another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from training import ranks
from training.bench.lines import Check, Finding, NotApplicableError, Setup, serve
from training.bench.short_runs import become_the_only_rank, config_file, has_deepspeed
from training.consts import DEMO, WEIGHTS
from training.data.held_out import rows_digest
from training.model.stored_weights import stored_weights
from training.options.settings import Settings, resolve
from training.options.trainer_options import TrainingOptions
from training.run import final_model, finish, identity, prepare, start, steps
from training.run.failures import StopRequest
from training.storage import checkpoint

SAVED_STEP, LAST_STEP = 4, 8
# A resumed run ends this close to the run that was not stopped, as a share of what its weights moved in between.
# The kernels' order of additions may differ; Adam with wrong step counts is off by far more.
RESUME_TOLERANCE = 0.05


def save(setup: Setup) -> Finding:
    """A run of the demo with a checkpoint in the middle; its finished folder is verified from its files."""
    settings = _settings(setup, "saved")
    record = _run(settings, start.Start())
    losses = record["held_out_loss"]
    text = (
        f"{LAST_STEP} steps {_kind(settings)}, checkpoints at {SAVED_STEP} and {LAST_STEP}, finished folder verified; "
        f"held-out loss {losses['before']:.3f} to {losses['after']:.3f}"
    )
    return Finding(losses["after"] < losses["before"], text, {"held_out_loss": losses})


def reshard(setup: Setup) -> Finding:
    """The run resumed from its middle as if another number of ranks had written it, against the run without a stop."""
    output = Path(setup.folder) / "saved"
    saved, last = (output / f"checkpoint-{step}" for step in (SAVED_STEP, LAST_STEP))
    if not has_deepspeed():
        raise NotApplicableError("the package deepspeed is not installed")
    if not last.is_dir():
        raise NotApplicableError("there is no run to resume, because the line save did not pass")
    settings = _settings(setup, "resumed")
    of_two = _as_of_two_ranks(saved, settings.output)
    record = json.loads((output / "run.json").read_text())
    _run(settings, start.Start(of_two, record, saved_ranks=2))
    resumed = _weights(settings.output)
    before, expected = (
        {name: tensor.read() for name, tensor in stored_weights(folder).items()} for folder in (saved, last)
    )
    moved = sum((expected[name].float() - before[name].float()).square().sum() for name in expected) ** 0.5
    apart = sum((expected[name].float() - resumed[name].float()).square().sum() for name in expected) ** 0.5
    share = (apart / moved).item()
    text = (
        f"a checkpoint converted and loaded, {LAST_STEP - SAVED_STEP} steps {_kind(settings)}, finished folder verified; "
        f"its weights end {share:.1e} of their way from those of the run without a stop"
    )
    return Finding(share <= RESUME_TOLERANCE, text, {"share": share})


def _settings(setup: Setup, name: str) -> Settings:
    """A short run of the demo on one device; without DeepSpeed where it is not installed."""
    sharded = has_deepspeed()
    if sharded:
        become_the_only_rank()
    precision: dict[str, Any] = {} if sharded else {setup.precision: True}
    options = TrainingOptions(
        input_model=DEMO,
        training_dataset=(DEMO,),
        local_output_dir=str(Path(setup.folder) / name),
        deepspeed=config_file("z3", setup.precision) if sharded else None,
        per_device_train_batch_size=setup.rows,
        per_device_eval_batch_size=setup.rows,
        test_size=5 * setup.rows,
        lr=2.5e-3,
        max_steps=LAST_STEP,
        save_steps=SAVED_STEP,
        save_total_limit=2,
        eval_steps=SAVED_STEP,
        logging_steps=1,
        **precision,
    )
    return resolve(options, 1, setup.precision).with_plan_choices(False, None, "packed")


def _run(settings: Settings, begin: start.Start) -> dict[str, Any]:
    """The stages of training.trainer from `begin` on, without its checks of versions and of the plan."""
    settings, prepared = prepare.prepare(settings)
    record = identity.new_record(settings, rows_digest(prepared.train_rows, prepared.held_out_rows))
    record["decided"] = settings.plan_choices
    settings.output.mkdir(parents=True, exist_ok=True)
    begin = start.write(settings, prepared, begin, record, LAST_STEP)
    steps.run_steps(settings, prepared, begin, record, StopRequest())
    last = begin.last_checkpoint(settings.output, LAST_STEP)
    written = final_model.write_final_model(settings, last)
    ranks.end_process_group()
    return finish.finish(settings, prepared.ledger, record, last, *written)


def _as_of_two_ranks(saved: Path, output: Path) -> Path:
    """A copy of a checkpoint of one rank that says that two ranks wrote it. Their losses are averaged."""
    target = output.parent / "of-two-ranks" / saved.name
    shutil.copytree(saved, target)
    file = target / checkpoint.PROGRESS_FILE
    progress = json.loads(file.read_text())
    file.write_text(json.dumps(progress | {"loss_sums": 2 * progress["loss_sums"]}))
    return target


def _weights(folder: Path) -> dict[str, Any]:
    """The tensors of a saved model."""
    return {name: tensor for file in folder.glob(f"*{WEIGHTS}") for name, tensor in load_file(file).items()}


def _kind(settings: Settings) -> str:
    return (
        f"of ZeRO-{settings.zero.stage} in {settings.precision}"
        if settings.deepspeed
        else "without DeepSpeed"
    )


CHECKS: dict[str, Check] = {"save": save, "reshard": reshard}

if __name__ == "__main__":
    serve(CHECKS)
