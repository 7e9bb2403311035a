"""Does it fit, how long does it take, what does it cost: answered from numbers, before a weight is loaded.

    python -m training.plan --machine 8xA100-40GB                  Dolly's run
    python -m training.plan --machine g5.24xlarge --price 8.14 --plot memory.png
    python -m training.plan                                        this machine's own devices

Sizes are GiB (2**30 bytes), times hours or seconds. `plan_run` (training/plan/fit.py) is what the trainer asks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from training.errors import DataError, MachineError, ModelError, OptionsError
from training.machine.catalogue import MACHINES, find_machine
from training.machine.local import this_machine
from training.options.checks import option_problems
from training.options.command_line import some_click_options, value_problems
from training.options.trainer_options import TrainingOptions
from training.pictures import PictureFile
from training.plan.fit import Plan, plan_options
from training.plan.presets import preset_options
from training.plan.report import as_json, as_table, draw


@click.command(context_settings={"max_content_width": 110})
@click.option("--machine", metavar="NAME", help=f"One of {', '.join(MACHINES)}.  [default: this one]")
@click.option("--num-gpus", type=int, help="Devices to use.  [default: all; 2 CPU ranks]")
@some_click_options(
    "input_model",
    "training_dataset",
    "batching",
    "max_tokens_per_device",
    "max_steps",
    "test_size",
    "save_total_limit",
    # of the machine's GPU family, if not given
    deepspeed=None,
    per_device_train_batch_size=None,
    gradient_accumulation_steps=None,
    gradient_checkpointing=None,
    # of Dolly's notebook
    epochs=1.0,
    local_output_dir="OUTPUT",
)
@click.option("--price", type=click.FloatRange(0), help="Of the machine, an hour, in any currency.")
@click.option("--json", "json_", is_flag=True, help="For programs.")
@click.option("--plot", type=PictureFile(), metavar="FILE.png", help="Draw the memory of a device by part.")
@click.pass_context
def main(
    ctx: click.Context,
    machine: str | None,
    num_gpus: int | None,
    price: float | None,
    json_: bool,
    plot: Path | None,
    **options: Any,
) -> None:
    """Whether a run fits on a machine, how long it takes, what it costs. The defaults are Dolly's run."""
    try:
        if problems := [*value_problems(ctx), *_number_problems(price)]:
            raise OptionsError(*problems)
        plan = _plan_typed(machine, num_gpus, options)
    except (MachineError, ModelError, DataError, OptionsError) as error:
        raise click.UsageError(str(error)) from error
    if plot:
        draw(plan, plot)
    click.echo(json.dumps(as_json(plan, price), indent=2) if json_ else as_table(plan, price))
    if not plan.fits and not json_:
        raise SystemExit(1)  # so that `plan && train` does not train


def _number_problems(price: float | None) -> list[str]:
    if price is None or math.isfinite(price):
        return []
    return [f"--price {price}: expected a finite number"]


def _plan_typed(name: str | None, num_gpus: int | None, typed: dict[str, Any]) -> Plan:
    if num_gpus is not None and num_gpus < 1:
        raise MachineError(f"--num-gpus {num_gpus}: at least one device is needed to train")
    machine = this_machine(typed["local_output_dir"], num_gpus) if name is None else find_machine(name)
    if num_gpus and num_gpus > machine.count:
        raise MachineError(f"--num-gpus {num_gpus}: {machine.name} has {machine.count}")
    ranks = num_gpus or machine.count
    chosen = preset_options(machine.family, ranks, typed["batching"])
    options = TrainingOptions(**chosen | {key: value for key, value in typed.items() if value is not None})
    if problems := option_problems(options):
        raise OptionsError(*problems)
    return plan_options(options, ranks, machine)


if __name__ == "__main__":
    main()
