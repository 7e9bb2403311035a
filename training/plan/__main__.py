"""Does it fit, how long does it take, what does it cost: answered from numbers, before a weight is loaded.

    python -m training.plan --machine 8xA100-40GB                  Dolly's run
    python -m training.plan --machine g5.24xlarge --price 8.14 --plot memory.png
    python -m training.plan                                        this machine's own devices

Sizes are GiB (2**30 bytes), times hours or seconds. `plan_run` (training/verdict.py) is what the trainer asks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from training.consts import DEFAULT_INPUT_MODEL, DEFAULT_TEST_SIZE, DEFAULT_TRAINING_DATASET
from training.errors import MachineError, OptionsError
from training.machine.catalogue import MACHINES, Machine, find_machine
from training.machine.local import this_machine
from training.options.trainer_options import MOST_EPOCHS, MOST_ROWS, MOST_STEPS, TrainingOptions
from training.pictures import PictureFile
from training.plan.epoch import alpaca_lengths
from training.plan.fit import Plan, plan_run
from training.plan.lookup import dataset_lengths, model_facts
from training.plan.presets import PRESETS, preset_options
from training.plan.report import as_json, as_table, draw
from training.plan.settings import settings_of


@dataclass(frozen=True)
class PublishedRun:
    """An epoch of Dolly's padded recipe that somebody has timed: 8 rows a device, every layer checkpointed."""

    machine: str
    deepspeed: str
    hours: float
    source: str


_DATABRICKS = "README of databrickslabs/dolly"
_OUTERBOUNDS = "Outerbounds, Training a Large Language Model With Metaflow, Featuring Dolly"
PUBLISHED = (
    PublishedRun("8xA100-40GB", PRESETS["a100"].deepspeed, 0.5, _DATABRICKS),
    PublishedRun("4xA10", PRESETS["a10"].deepspeed, 7.0, _DATABRICKS),
    PublishedRun("8xV100-32GB", PRESETS["v100"].deepspeed, 3.5, _DATABRICKS),
    PublishedRun("p3dn.24xlarge", PRESETS["v100"].deepspeed, 3.25, _OUTERBOUNDS),
    # 30 hours for 10 epochs, with "the same software setup" as on V100: fp16, optimizer offloaded
    PublishedRun("3xA100-80GB", PRESETS["v100"].deepspeed, 3.0, _OUTERBOUNDS),
)


def predict_published(run: PublishedRun) -> tuple[Plan, Plan]:
    """(Dolly's recipe, ours) on the machine of a published run."""
    machine, model, lengths = find_machine(run.machine), model_facts(DEFAULT_INPUT_MODEL), alpaca_lengths()
    dolly = {"deepspeed": run.deepspeed, "batching": "padded", "gradient_checkpointing": "on"}
    ours = preset_options(machine.family, machine.count) | {"max_tokens_per_device": "auto"}
    padded, packed = (
        plan_run(
            TrainingOptions(local_output_dir="OUTPUT", epochs=1.0, **chosen),
            machine.count,
            lengths,
            model,
            machine,
        )
        for chosen in (dolly, ours)
    )
    return padded, packed


def published_table() -> str:
    """Markdown: what was published, what the plan says of the same recipe, and of ours."""
    lines = [
        "| machine | published, h | plan, h | plan / published | packed (prediction), h |",
        "|---|---|---|---|---|",
    ]
    for run in PUBLISHED:
        padded, packed = predict_published(run)
        hours, ours = padded.hours_per_epoch["expected"], packed.hours_per_epoch["expected"]
        lines.append(
            f"| {run.machine} | {run.hours:.2f} | {hours:.2f} | {hours / run.hours:.2f} | {ours:.2f} |"
        )
    return "\n".join(lines)


@click.command(context_settings={"max_content_width": 110})
@click.option("--machine", metavar="NAME", help=f"One of {', '.join(MACHINES)}.  [default: this one]")
@click.option("--num-gpus", type=int, help="Devices to use.  [default: all; 2 CPU ranks]")
@click.option(
    "--input-model", "--model", default=DEFAULT_INPUT_MODEL, show_default=True, help="As the trainer's."
)
@click.option(
    "--training-dataset", default=DEFAULT_TRAINING_DATASET, show_default=True, help="As the trainer's."
)
@click.option("--batching", type=click.Choice(("packed", "padded")), default="packed", show_default=True)
@click.option(
    "--per-device-train-batch-size", type=click.IntRange(1, MOST_ROWS), help="[default: the GPU family's]"
)
@click.option(
    "--gradient-accumulation-steps", type=click.IntRange(1, MOST_ROWS), help="[default: for 64 rows a step]"
)
@click.option(
    "--gradient-checkpointing",
    type=click.Choice(("auto", "on", "off")),
    help="[default: auto, which is on where memory is short without it]",
)
@click.option("--max-tokens-per-device", type=click.IntRange(1), help="[default: what fits]")
@click.option("--deepspeed", metavar="FILE", help="DeepSpeed JSON.  [default: the GPU family's]")
@click.option(
    "--epochs", type=click.FloatRange(0, MOST_EPOCHS, min_open=True), default=1.0, show_default=True
)
@click.option("--max-steps", type=click.IntRange(1, MOST_STEPS), help="As the trainer's.")
@click.option("--test-size", type=click.IntRange(1), default=DEFAULT_TEST_SIZE, show_default=True)
@click.option("--save-total-limit", type=click.IntRange(1), help="[default: the trainer's]")
@click.option("--local-output-dir", default="OUTPUT", help="The folder on whose disk free space counts.")
@click.option("--price", type=click.FloatRange(0), help="Of the machine, an hour, in any currency.")
@click.option("--json", "json_", is_flag=True, help="For programs.")
@click.option("--plot", type=PictureFile(), metavar="FILE.png", help="Draw the memory of a device by part.")
@click.option("--published", is_flag=True, help="Print published times beside this plan's, and end.")
def main(
    machine: str | None,
    num_gpus: int | None,
    price: float | None,
    json_: bool,
    plot: Path | None,
    published: bool,
    **options: Any,
) -> None:
    """Whether a run fits on a machine, how long it takes, what it costs. The defaults are Dolly's run."""
    if published:
        click.echo(published_table())
        return
    for name, text in (("machine", machine), *options.items()):
        if isinstance(text, str) and not text.strip():  # of a shell variable that was never set
            raise click.UsageError(
                f"--{name.replace('_', '-')} is empty. Give a value, or leave the option out"
            )
    for name, number in (("--epochs", options["epochs"]), ("--price", price)):
        if number is not None and not math.isfinite(number):
            raise click.UsageError(f"{name} {number}: expected a finite number")
    try:
        plan = _plan_typed(machine, num_gpus, options)
    except (MachineError, OptionsError) as error:
        raise click.UsageError(str(error)) from error
    except ValueError as error:  # their modules import torch, which a built-in model does not need
        if type(error).__name__ not in ("ModelError", "DataError"):
            raise
        raise click.UsageError(str(error)) from error
    if plot:
        draw(plan, plot)
    click.echo(json.dumps(as_json(plan, price), indent=2) if json_ else as_table(plan, price))
    if not plan.fits and not json_:
        raise SystemExit(1)  # so that `plan && train` does not train


def _plan_typed(name: str | None, num_gpus: int | None, typed: dict[str, Any]) -> Plan:
    if num_gpus is not None and num_gpus < 1:
        raise MachineError(f"--num-gpus {num_gpus}: at least one device is needed to train")
    machine = find_machine(name) if name else this_machine(typed["local_output_dir"], num_gpus)
    if num_gpus and num_gpus > machine.count:
        raise MachineError(f"--num-gpus {num_gpus}: {machine.name} has {machine.count}")
    ranks = num_gpus or machine.count
    chosen = preset_options(machine.family, ranks, typed["batching"]) | {"max_tokens_per_device": "auto"}
    chosen |= {key: value for key, value in typed.items() if value is not None}
    if chosen["batching"] == "padded" and isinstance(chosen["max_tokens_per_device"], int):
        raise OptionsError("--max-tokens-per-device splits packed rows, and --batching padded has none")
    return plan_options(TrainingOptions(**chosen), ranks, machine)


def plan_options(options: TrainingOptions, ranks: int, machine: Machine) -> Plan:
    """The plan of a run by the trainer's options, for whoever starts it: model and rows are looked up by their names.

    Raises OptionsError for what can be said without the plan; ModelError or DataError (training.model, training.rows)
    where model or dataset cannot be loaded.
    """
    model = model_facts(options.input_model)
    if machine.family == "v100" and settings_of(options, ranks, machine.family).precision == "bf16":
        raise OptionsError(f"a V100 cannot compute in bf16. Type --deepspeed {PRESETS['v100'].deepspeed}")
    lengths = dataset_lengths(options.training_dataset, model)
    if len(lengths.tokens) < 2:
        from training.data.rows import too_few_rows

        raise OptionsError(f"--training-dataset: {too_few_rows(len(lengths.tokens))}. Name one with more")
    if options.test_size >= len(lengths.tokens):
        raise OptionsError(
            f"--test-size {options.test_size:,} of {len(lengths.tokens):,} rows leaves none to train on"
        )
    return plan_run(options, ranks, lengths, model, machine)


if __name__ == "__main__":
    main()
