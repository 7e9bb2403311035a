"""Whether a run fits, how long it takes and what it costs, answered from numbers before a weight is loaded.

    python -m training.plan --machine 8xA100-40GB                  Dolly's run
    python -m training.plan --machine g5.24xlarge --price 8.14 --plot memory.png
    python -m training.plan                                        this machine's own devices

Sizes are GiB (2**30 bytes), times hours or seconds. The trainer calls `plan_run` (training/plan/fit.py) itself."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from training.errors import DataError, MachineError, ModelError, OptionsError
from training.machine.catalogue import MACHINES, find_machine
from training.machine.local import this_machine
from training.options.checks import option_problems, section_problems
from training.options.command_line import CollectedOption, some_click_options, value_problems
from training.options.deepspeed import read_json
from training.options.trainer_options import TrainingOptions
from training.pictures import PictureFile
from training.plan.fit import Plan, plan_options
from training.plan.presets import preset_options
from training.plan.report import as_json, as_table, draw

# An option whose bad value is reported together with all others.
_option = partial(click.option, cls=CollectedOption)


def _long_name(word: str) -> str:
    """--model is short for --input-model."""
    return "input-model" if word == "model" else word


@click.command(context_settings={"max_content_width": 110, "token_normalize_func": _long_name})
@_option("--machine", metavar="NAME", help=f"One of {', '.join(MACHINES)}.  [default: this one]")
@_option("--num-gpus", type=int, help="Devices to use.  [default: all; 2 CPU ranks]")
@some_click_options(
    "input_model",
    "training_dataset",
    "batching",
    "max_tokens_per_device",
    "gradient_checkpointing",
    "max_steps",
    "test_size",
    "save_total_limit",
    # the GPU family's where they are left out
    deepspeed=None,
    per_device_train_batch_size=None,
    gradient_accumulation_steps=None,
    # as in Dolly's notebook
    epochs=1.0,
    local_output_dir="OUTPUT",
)
@_option("--price", type=click.FloatRange(0), help="Of the machine, an hour, in any currency.")
@_option("--json", "json_", is_flag=True, help="For programs.")
@_option("--plot", type=PictureFile(), metavar="FILE.png", help="Draw the memory of a device by part.")
@click.pass_context
def main(
    ctx: click.Context,
    machine: str | None,
    num_gpus: int | None,
    price: float | None,
    json_: bool,
    plot: Path | None,
    **typed: Any,
) -> None:
    """Whether a run fits on a machine, how long it takes, what it costs. The defaults are Dolly's run.

    --deepspeed, --per-device-train-batch-size and --gradient-accumulation-steps are those of the machine's GPU family
    where you leave them out; --local-output-dir is where the run would write. --model is short for --input-model.
    """
    problems = value_problems(ctx)
    if price is not None and not math.isfinite(price):
        problems.append(f"--price {price}: expected a finite number")
    with redirect_stdout(sys.stderr):  # DeepSpeed prints as it is imported
        plan = _plan(machine, num_gpus, typed, problems)
    if plan is None:
        raise click.UsageError("\n".join(problems))
    if plot:
        draw(plan, plot)
    click.echo(json.dumps(as_json(plan, price), indent=2) if json_ else as_table(plan, price))
    if not plan.fits and not json_:
        raise SystemExit(1)  # so that `plan && train` does not train


def _plan(name: str | None, num_gpus: int | None, typed: dict[str, Any], problems: list[str]) -> Plan | None:
    """The plan; None if there are `problems`, which get all that are found here."""
    options = TrainingOptions(**{key: value for key, value in typed.items() if value is not None})
    problems += option_problems(options)
    for flag, word in (("--machine", name), ("--deepspeed", options.deepspeed)):
        if word is not None and not word.strip():  # of a shell variable that was never set
            problems.append(f"{flag} is empty. Give a value, or leave the option out")
    with _collected(problems):
        if options.deepspeed:
            problems += section_problems(options, read_json(options.deepspeed))
    with _collected(problems):
        machine = this_machine(options.local_output_dir, num_gpus) if not name else find_machine(name)
        if num_gpus and num_gpus > machine.count:
            raise MachineError(f"--num-gpus {num_gpus}: {machine.name} has {machine.count}")
        ranks = machine.count if num_gpus is None else num_gpus
        chosen = preset_options(machine.family, ranks, options.batching)
        options = replace(options, **{key: value for key, value in chosen.items() if typed[key] is None})
        if not problems:
            return plan_options(options, ranks, machine)
    return None


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Adds an error that is the user's to `problems`."""
    try:
        yield
    except OptionsError as error:
        problems += error.problems
    except (MachineError, ModelError, DataError) as error:
        problems.append(str(error))
    except RuntimeError as error:  # ~nobody
        problems.append(f"--local-output-dir: {error} Name a folder of your own")


if __name__ == "__main__":
    main()
