"""Does it fit, how long does it take, what does it cost: answered from numbers, before a weight is loaded.

    python -m training.plan --machine 8xA100-40GB                  Dolly's run
    python -m training.plan --machine g5.24xlarge --price 8.14 --plot memory.png
    python -m training.plan                                        this machine's own devices

Sizes are GiB (2**30 bytes), times hours or seconds. The trainer asks `plan_run` before it trains.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, fields, replace
from typing import Any

import click

from training.consts import DEFAULT_INPUT_MODEL, DEFAULT_TEST_SIZE, DEFAULT_TRAINING_DATASET
from training.machines import GIB, GPUS, MACHINES, Machine, MachineError, find_machine, this_machine
from training.memory import (
    CPU_PROCESS_GIB,
    auto_gradient_checkpointing,
    auto_max_tokens_per_device,
    device_memory,
    disk,
    host_memory,
    peak_activation_bytes,
)
from training.options import OptionsError, TrainingOptions
from training.picture import draw_memory
from training.settings import PRESETS, Settings, preset_options, rows_and_accumulation, settings_of
from training.timing import CPU_RANGE, GPU_RANGE, CpuRates, cpu_rates, epoch_hours, step_seconds
from training.workload import (
    Lengths,
    Load,
    ModelFacts,
    alpaca_lengths,
    dataset_lengths,
    epoch_load,
    model_facts,
)

# --- the plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run on a machine, in numbers.

    Attributes:
        settings: with `checkpointing` (bool) and `max_tokens` (int or None) decided.
        gpu_memory_gib: of one device by part. On a CPU machine it is host memory, counted there as well.
        activations_gib: activations and logits "with checkpointing" and "without checkpointing".
        host_memory_gib: "loading" and "training".
        disk_gib: by part.
        step_seconds: of one optimizer step by part.
        hours_per_epoch: "low", "expected", "high".
        shortages: kind ("GPU memory", "host memory", "disk") to a sentence; empty if it fits.
        changes: for each kind the nearest change that makes it fit.
        command: what to type for this run.
    """

    model: ModelFacts
    machine: Machine
    settings: Settings
    load: Load
    gpu_memory_gib: dict[str, float]
    activations_gib: dict[str, float]
    host_memory_gib: dict[str, float]
    disk_gib: dict[str, float]
    step_seconds: dict[str, float]
    hours_per_epoch: dict[str, float]
    shortages: dict[str, str]
    changes: dict[str, str]
    command: str

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def faults(self) -> list[str]:
        """What is short, by how much, and the nearest change that makes it fit; empty if it fits."""
        return [f"{sentence}. {self.changes[kind]}" for kind, sentence in self.shortages.items()]


def plan_run(
    options: TrainingOptions,
    world_size: int,
    lengths: Lengths,
    model: ModelFacts,
    machine: Machine,
    rates: CpuRates | None = None,
) -> Plan:
    """Weighs a run of `world_size` ranks against a machine, or several of its kind where it has fewer devices.

    `options.gradient_checkpointing` may be "auto", "on", "off" or a bool, `options.max_tokens_per_device` "auto",
    None or a number; the plan's settings have them decided. `rates` of a CPU machine are measured if not given.

    Raises OptionsError for an unreadable DeepSpeed file.
    """
    if machine.is_cpu and rates is None:
        rates = cpu_rates(model.width, settings_of(options, world_size, machine.family).precision, world_size)
    plan = _weigh(options, world_size, lengths, model, machine, rates)
    if plan.fits:
        return plan
    return replace(plan, changes=_nearest_changes(plan, options, world_size, lengths, rates))


def _weigh(
    options: TrainingOptions,
    ranks: int,
    lengths: Lengths,
    model: ModelFacts,
    machine: Machine,
    rates: CpuRates | None,
) -> Plan:
    settings = settings_of(options, ranks, machine.family)
    load, share, cpu = epoch_load(lengths, settings), lengths.response_share, machine.is_cpu
    local = min(ranks, machine.count)
    room = machine.host_gib / local if cpu else machine.gpu_memory_gib
    if settings.checkpointing == "auto":
        decided = auto_gradient_checkpointing(model, settings, load, share, room, cpu)
        settings = replace(settings, checkpointing=decided)
    if settings.max_tokens == "auto":
        budget = auto_max_tokens_per_device(model, settings, load, share, room, cpu)
        settings = replace(settings, max_tokens=budget)
    gpu = device_memory(model, settings, load, share, cpu)
    activations = {
        f"{word} checkpointing": sum(peak_activation_bytes(model, settings, load, share, word == "with"))
        / GIB
        for word in ("with", "without")
    }
    host = host_memory(model, settings, local, cpu)
    if cpu:
        host["training"] += local * (sum(gpu.values()) - CPU_PROCESS_GIB)
    steps = settings.max_steps or math.ceil(settings.epochs * load.steps)
    stored = disk(model, settings, steps)
    seconds = step_seconds(model, machine, settings, load, share, rates)
    hours, spread = epoch_hours(model, settings, load, seconds), CPU_RANGE if cpu else GPU_RANGE
    return Plan(
        model=model,
        machine=machine,
        settings=settings,
        load=load,
        gpu_memory_gib=gpu,
        activations_gib=activations,
        host_memory_gib=host,
        disk_gib=stored,
        step_seconds=seconds,
        hours_per_epoch={"low": hours / spread, "expected": hours, "high": hours * spread},
        shortages=_shortages(machine, sum(gpu.values()), host, sum(stored.values())),
        changes={},
        command=command(options, settings),
    )


def _shortages(
    machine: Machine, gpu_gib: float, host_gib: dict[str, float], disk_gib: float
) -> dict[str, str]:
    """What the machine lacks, each with the numbers. A CPU rank has no memory of its own."""
    short = {}
    if not machine.is_cpu and gpu_gib > machine.gpu_memory_gib:
        short["GPU memory"] = (
            f"GPU memory: {gpu_gib:.1f} GiB are needed on each {machine.gpu}, "
            f"{gpu_gib - machine.gpu_memory_gib:.1f} more than its {machine.gpu_memory_gib:.1f}"
        )
    when = max(host_gib, key=lambda key: host_gib[key])
    if host_gib[when] > machine.host_gib:
        short["host memory"] = (
            f"host memory: {host_gib[when]:.1f} GiB are needed while {when}, "
            f"{host_gib[when] - machine.host_gib:.1f} more than the {machine.host_gib:.1f} of {machine.name}"
        )
    if disk_gib > machine.disk_gib:
        short["disk"] = (
            f"disk: {disk_gib:.1f} GiB are needed for checkpoints, model and cache, "
            f"{disk_gib - machine.disk_gib:.1f} more than the {machine.disk_gib:.1f} of {machine.name}"
        )
    return short


# --- the nearest change that makes it fit ------------------------------------------------------------


def _nearest_changes(
    failed: Plan, options: TrainingOptions, ranks: int, lengths: Lengths, rates: CpuRates | None
) -> dict[str, str]:
    """For each shortage the first change that ends it and makes no other: options before other machines."""
    tried = [
        (advice, _weigh(changed, count, lengths, failed.model, machine, rates))
        for advice, changed, count, machine in _candidates(failed, options, ranks)
    ]
    room = {
        "GPU memory": f"Nothing near it fits: {failed.model.name} needs more GPUs or larger ones",
        "host memory": f"A machine with {math.ceil(max(failed.host_memory_gib.values()))} GiB of free host "
        "memory would do",
        "disk": f"Name a folder on a disk with {math.ceil(sum(failed.disk_gib.values()))} GiB free: "
        "--local-output-dir FOLDER",
    }
    for kind in failed.shortages:
        for advice, plan in tried:
            if kind not in plan.shortages and plan.shortages.keys() <= failed.shortages.keys():
                room[kind] = advice
                break
    return {kind: room[kind] for kind in failed.shortages}


def _candidates(
    failed: Plan, options: TrainingOptions, ranks: int
) -> list[tuple[str, TrainingOptions, int, Machine]]:
    """(advice, options, ranks, machine), the smallest change first."""
    settings, machine = failed.settings, failed.machine
    found: list[tuple[str, TrainingOptions, int, Machine]] = []

    def add(
        changed: dict[str, Any], count: int = ranks, elsewhere: Machine = machine, where: str = ""
    ) -> None:
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
        advice = f"It fits on {where}{' with ' if words else ''}{words}" if where else f"Type {words}"
        found.append((advice, replace(options, **changed), count, elsewhere))

    saving: dict[str, Any] = {} if settings.checkpointing else {"gradient_checkpointing": "on"}
    if saving:
        add(saving)
    if settings.packed and settings.max_tokens is None:
        budget = auto_max_tokens_per_device(
            failed.model,
            replace(settings, checkpointing=True),
            failed.load,
            0.0,
            machine.host_gib / ranks if machine.is_cpu else machine.gpu_memory_gib,
            machine.is_cpu,
        )
        if budget:
            add(saving | {"max_tokens_per_device": budget})
    if settings.checkpoints > 1:
        add({"save_total_limit": 1})
    for rows in (2**i for i in reversed(range(6)) if 2**i < settings.rows):
        steps = settings.accumulation * math.ceil(settings.rows / rows)
        add({"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | saving)
    preset = PRESETS[machine.family]
    if settings.zero.stage == 0 and ranks > 1:
        add({"deepspeed": preset.deepspeed})
    if settings.zero.offload_optimizer and preset.deepspeed != options.deepspeed_json:
        add({"deepspeed": preset.deepspeed})
    offload = {"deepspeed": preset.offload} if preset.offload and not settings.zero.offload_optimizer else {}
    if offload:
        add(offload | saving)
    if machine.is_cpu:
        return found
    for name, gpu in GPUS.items():
        if gpu.family == machine.family and gpu.memory_gib > machine.gpu_memory_gib + 1:
            larger = replace(machine, gpu=name, gpu_memory_gib=gpu.memory_gib)
            add(saving, ranks, larger, f"{ranks} {name}")
    for count in (2, 3, 4, 8, 16, 32):
        if count > ranks:
            rows, steps = rows_and_accumulation(settings.global_batch, count, options.batching)
            spread = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | saving
            more = replace(machine, count=count)
            add(spread, count, more, f"{count} {machine.gpu}")
            if offload:
                add(offload | spread, count, more, f"{count} {machine.gpu}")
    return found


def command(options: TrainingOptions, settings: Settings) -> str:
    """What to type for this run; options that are the trainer's defaults are left out."""
    if options.deepspeed_json:
        words = ["deepspeed", "--num_gpus", str(settings.ranks), "--module", "training.trainer"]
    elif settings.ranks > 1:
        words = ["torchrun", f"--nproc_per_node={settings.ranks}", "-m", "training.trainer"]
    else:
        words = ["python", "-m", "training.trainer"]
    for option in fields(TrainingOptions):
        value = getattr(options, option.name)
        flag = "--" + option.name.replace("_", "-")
        if option.name == "deepspeed":
            value = options.deepspeed_json
        elif option.name == "max_tokens_per_device":
            value = settings.max_tokens
        elif option.name == "gradient_checkpointing":
            value = {True: "on", False: "off", "auto": option.default}.get(value, value)
        if value == option.default or option.name in ("deepspeed_config", "local_rank"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


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
    }
    if price is not None:
        answer["cost_per_epoch"] = {key: price * hours for key, hours in plan.hours_per_epoch.items()}
    return answer


def as_table(plan: Plan, price: float | None) -> str:
    """The plan for people."""
    machine, settings, load = plan.machine, plan.settings, plan.load
    device = "CPU rank" if machine.is_cpu else machine.gpu
    total, hours, seconds = sum(plan.gpu_memory_gib.values()), plan.hours_per_epoch, plan.step_seconds
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
        f"  {hours['expected']:.2g} hours, between {hours['low']:.2g} and {hours['high']:.2g}"
        + ("" if price is None else f"; at {price:g} an hour it costs {_costs(price, hours)}"),
        "",
    ]
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


def _costs(price: float, hours: dict[str, float]) -> str:
    low, expected, high = (f"{price * hours[key]:,.2f}" for key in ("low", "expected", "high"))
    return f"{expected}, between {low} and {high}"


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
@click.option("--per-device-train-batch-size", type=click.IntRange(1), help="[default: the GPU family's]")
@click.option("--gradient-accumulation-steps", type=click.IntRange(1), help="[default: for 64 rows a step]")
@click.option(
    "--gradient-checkpointing",
    type=click.Choice(("auto", "on", "off")),
    help="[default: the GPU family's: on where it must]",
)
@click.option("--max-tokens-per-device", type=click.IntRange(1), help="[default: what fits]")
@click.option("--deepspeed", metavar="FILE", help="DeepSpeed JSON.  [default: the GPU family's]")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--test-size", type=click.IntRange(1), default=DEFAULT_TEST_SIZE, show_default=True)
@click.option("--save-total-limit", type=click.IntRange(1), help="[default: the trainer's]")
@click.option("--local-output-dir", default="OUTPUT", help="The folder on whose disk free space counts.")
@click.option("--price", type=click.FloatRange(0), help="Of the machine, an hour, in any currency.")
@click.option("--json", "json_", is_flag=True, help="For programs.")
@click.option("--plot", metavar="FILE.png", help="Draw the memory of a device by part.")
@click.option("--published", is_flag=True, help="Print published times beside this plan's, and end.")
def main(
    machine: str | None,
    num_gpus: int | None,
    price: float | None,
    json_: bool,
    plot: str | None,
    published: bool,
    **options: Any,
) -> None:
    """Whether a run fits on a machine, how long it takes, what it costs. The defaults are Dolly's run."""
    if published:
        click.echo(published_table())
        return
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


def _plan_typed(name: str | None, num_gpus: int | None, typed: dict[str, Any]) -> Plan:
    if num_gpus is not None and num_gpus < 1:
        raise MachineError(f"--num-gpus {num_gpus}: at least one device is needed to train")
    machine = find_machine(name) if name else this_machine(typed["local_output_dir"], num_gpus)
    if num_gpus and num_gpus > machine.count:
        raise MachineError(f"--num-gpus {num_gpus}: {machine.name} has {machine.count}")
    ranks = num_gpus or machine.count
    model = model_facts(typed["input_model"])
    chosen = preset_options(machine.family, ranks, typed["batching"]) | {"max_tokens_per_device": "auto"}
    chosen |= {key: value for key, value in typed.items() if value is not None}
    if chosen["batching"] == "padded" and isinstance(chosen["max_tokens_per_device"], int):
        raise OptionsError(["--max-tokens-per-device splits packed rows, and --batching padded has none"])
    lengths = dataset_lengths(typed["training_dataset"], model)
    return plan_run(TrainingOptions(**chosen), ranks, lengths, model, machine)


def draw(plan: Plan, file: str) -> None:
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
