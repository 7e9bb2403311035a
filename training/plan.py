"""Does it fit, how long does it take, what does it cost: answered from numbers, before a weight is loaded.

    python -m training.plan --machine 8xA100-40GB                  Dolly's run
    python -m training.plan --machine g5.24xlarge --price 8.14 --plot memory.png
    python -m training.plan                                        this machine's own devices

Sizes are GiB (2**30 bytes), times hours or seconds. `plan_run` (training/verdict.py) is what the trainer asks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from training.consts import DEFAULT_INPUT_MODEL, DEFAULT_TEST_SIZE, DEFAULT_TRAINING_DATASET
from training.machines import MACHINES, Machine, MachineError, find_machine, this_machine
from training.options import MOST_EPOCHS, MOST_ROWS, MOST_STEPS, OptionsError, TrainingOptions
from training.picture import PictureFile, draw_memory
from training.settings import PRESETS, preset_options, settings_of
from training.verdict import Plan, plan_run
from training.workload import alpaca_lengths, dataset_lengths, model_facts

# --- published runs ----------------------------------------------------------------------------------


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


# --- for programs and for people ---------------------------------------------------------------------


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """The plan for programs; sizes in GiB, times in hours or seconds, as the keys say."""
    settings, machine, load = plan.settings, plan.machine, plan.load
    answer: dict[str, Any] = {
        "fits": plan.fits,
        "faults": plan.faults,
        "command": plan.command,
        "model": plan.model.name,
        "parameters": plan.model.parameters,
        "machine": machine.name,
        "gpu": machine.gpu,
        "num_gpus": settings.ranks,
        "precision": settings.precision,
        "batching": "packed" if settings.packed else "padded",
        "gradient_checkpointing": settings.checkpointing,
        "max_tokens_per_device": settings.max_tokens,
        "global_batch_rows": settings.global_batch,
        "gpu_memory_gib": plan.gpu_memory_gib
        | {
            "total": sum(plan.gpu_memory_gib.values()),
            "available": None if machine.is_cpu else machine.gpu_memory_gib,
        },
        "activations_gib": plan.activations_gib,
        "host_memory_gib": plan.host_memory_gib
        | {"total": max(plan.host_memory_gib.values()), "available": machine.host_gib},
        "disk_gib": plan.disk_gib | {"total": sum(plan.disk_gib.values()), "available": machine.disk_gib},
        "steps_per_epoch": load.steps,
        "real_tokens_per_epoch": load.real_tokens,
        "computed_tokens_per_epoch": load.computed_tokens,
        "paced_tokens_per_epoch": load.paced_tokens,
        "step_seconds": plan.step_seconds,
        "hours_per_epoch": plan.hours_per_epoch,
        "steps": plan.steps,
        "hours": plan.hours,
    }
    if price is not None:
        answer["cost_per_epoch"] = {key: price * hours for key, hours in plan.hours_per_epoch.items()}
        answer["cost"] = {key: price * hours for key, hours in plan.hours.items()}
    return answer


def as_table(plan: Plan, price: float | None) -> str:
    """The plan for people."""
    machine, settings, load = plan.machine, plan.settings, plan.load
    device = "CPU rank" if machine.is_cpu else machine.gpu
    total, seconds = sum(plan.gpu_memory_gib.values()), plan.step_seconds
    split = f", at most {settings.max_tokens:,} tokens at once" if settings.max_tokens else ""
    lines = [
        f"{plan.model.name} ({_count(plan.model.parameters)} parameters) on {machine.name}: "
        f"{settings.ranks} x {device}, {settings.precision}",
        f"{settings.rows} rows a device x {settings.ranks} x {settings.accumulation} = {settings.global_batch} a step, "
        f"{'packed' if settings.packed else 'padded'}, "
        f"gradient checkpointing {'on' if settings.checkpointing else 'off'}{split}",
        "",
        f"memory of each {device}, GiB",
        *(_line(name, value) for name, value in plan.gpu_memory_gib.items() if value),
        _line("together", total, None if machine.is_cpu else machine.gpu_memory_gib),
        "activations and logits, GiB",
        *(_line(name, value) for name, value in plan.activations_gib.items()),
        "host memory, GiB",
        *(_line(name, value, machine.host_gib) for name, value in plan.host_memory_gib.items()),
        "disk, GiB",
        *(_line(name, value) for name, value in plan.disk_gib.items()),
        _line("together", sum(plan.disk_gib.values()), machine.disk_gib),
        "an epoch",
        f"  {load.steps:,} steps of {sum(seconds.values()):.2f} s: "
        + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value),
        f"  {load.real_tokens:,} real tokens of {load.computed_tokens:,} computed "
        f"({load.real_tokens / load.computed_tokens:.0%}); {load.real_tokens / load.paced_tokens:.0%} "
        "of what the slowest device's pace allows",
        _time_and_cost(plan.hours_per_epoch, price),
    ]
    if plan.steps != load.steps:
        lines += [f"the whole run, {plan.steps:,} steps", _time_and_cost(plan.hours, price)]
    lines.append("")
    if plan.fits:
        left = (
            "" if machine.is_cpu else f", with {machine.gpu_memory_gib - total:.1f} GiB of each {device} left"
        )
        return "\n".join([*lines, f"FITS{left}", f"  {plan.command}"])
    return "\n".join([*lines, "DOES NOT FIT", *(f"  {fault}" for fault in plan.faults)])


def _line(name: str, value: float, available: float | None = None) -> str:
    number = f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"  # enough to see a small model's parts
    return f"  {name:<28}{number:>9}" + ("" if available is None else f"  of {available:,.1f}")


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e8 else f"{parameters / 1e6:.2f} million"


def _time(hours: float) -> str:
    if hours >= 2:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.0f} minutes" if hours >= 1 / 30 else f"{3600 * hours:.0f} seconds"


def _time_and_cost(hours: dict[str, float], price: float | None) -> str:
    line = f"  {_time(hours['expected'])}, between {_time(hours['low'])} and {_time(hours['high'])}"
    if price is None:
        return line
    low, expected, high = (f"{price * hours[key]:,.2f}" for key in ("low", "expected", "high"))
    return f"{line}; at {price:g} an hour it costs {expected}, between {low} and {high}"


# --- the command line --------------------------------------------------------------------------------


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
        raise OptionsError(["--max-tokens-per-device splits packed rows, and --batching padded has none"])
    return plan_options(TrainingOptions(**chosen), ranks, machine)


def plan_options(options: TrainingOptions, ranks: int, machine: Machine) -> Plan:
    """The plan of a run by the trainer's options, for whoever starts it: model and rows are looked up by their names.

    Raises OptionsError for what can be said without the plan; ModelError or DataError (training.model, training.rows)
    where model or dataset cannot be loaded.
    """
    model = model_facts(options.input_model)
    if machine.family == "v100" and settings_of(options, ranks, machine.family).precision == "bf16":
        raise OptionsError([f"a V100 cannot compute in bf16. Type --deepspeed {PRESETS['v100'].deepspeed}"])
    lengths = dataset_lengths(options.training_dataset, model)
    if len(lengths.tokens) < 2:
        from training.rows import too_few_rows  # not above: it imports what a built-in dataset does not need

        raise OptionsError([f"--training-dataset: {too_few_rows(len(lengths.tokens))}. Name one with more"])
    if options.test_size >= len(lengths.tokens):
        raise OptionsError(
            [f"--test-size {options.test_size:,} of {len(lengths.tokens):,} rows leaves none to train on"]
        )
    return plan_run(options, ranks, lengths, model, machine)


def draw(plan: Plan, file: Path) -> None:
    """The memory of a device by part against its size, as an image file."""
    settings, machine = plan.settings, plan.machine
    draw_memory(
        plan.gpu_memory_gib,
        machine.gpu_memory_gib,
        "CPU rank" if machine.is_cpu else machine.gpu,
        f"{plan.model.name} on {machine.name}, {'packed' if settings.packed else 'padded'}, "
        f"checkpointing {'on' if settings.checkpointing else 'off'}: "
        f"{sum(plan.gpu_memory_gib.values()):.1f} GiB, {'fits' if plan.fits else 'does not fit'}",
        file,
    )


if __name__ == "__main__":
    main()
