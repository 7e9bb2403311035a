"""Shows a plan as a table, as JSON or as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.consts import STOP_SECONDS
from training.data.source_names import joined
from training.errors import printable
from training.files import duration
from training.options.intervals import steps_between_saves
from training.pictures import draw_plan
from training.plan.adapter import trained_parameters
from training.plan.fit import Plan, fastest
from training.plan.memory import remote_gib
from training.plan.overhead import checkpoints
from training.plan.presets import method_of


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """The plan as a JSON object; the keys name the units of sizes (GiB) and times (hours or seconds)."""
    settings, machine, load = plan.settings, plan.machine, plan.load
    answer: dict[str, Any] = {
        "fits": plan.fits,
        "faults": plan.problems,
        "nearest": plan.nearest and {"machine": plan.nearest.machine.name, "command": plan.nearest.command},
        "warnings": [plan.warning] if plan.warning else [],
        "command": plan.command,
        "model": plan.model.name,
        "datasets": list(settings.options.training_dataset),
        "parameters": plan.model.parameters,
        "machine": machine.name,
        "gpu": machine.gpu,
        "num_gpus": settings.ranks,
        "precision": settings.precision,
        "method": method_of(asdict(settings.options)),
        "trained_parameters": trained_parameters(plan.model, settings),
        "batching": settings.batching,
        "gradient_checkpointing": settings.checkpointing,
        "max_tokens_per_device": settings.max_tokens,
        "global_batch_rows": settings.global_batch,
        "gpu_memory_gib": _sizes(
            plan.gpu_memory_gib, sum, None if machine.is_cpu else machine.gpu_memory_gib
        ),
        "activations_gib": plan.activations_gib,
        "host_memory_gib": _sizes(plan.host_memory_gib, max, machine.host_gib),
        "disk_gib": _sizes(plan.disk_gib, sum, machine.disk_gib),
        "copied_gib": remote_gib(plan.model, settings, plan.steps),
        "steps_per_epoch": load.steps,
        "real_tokens_per_epoch": load.real_tokens,
        "computed_tokens_per_epoch": load.computed_tokens,
        "paced_tokens_per_epoch": load.paced_tokens,
        "step_seconds": plan.step_seconds,
        "deepspeed_files": {
            file: {
                "fits": other.fits,
                "gpu_memory_gib": sum(other.gpu_memory_gib.values()),
                "hours": other.hours["expected"],
            }
            for file, other in plan.files.items()
        },
        "fastest_deepspeed_file": fastest(plan.files),
        "steps": plan.steps,
        "run_seconds": plan.run_seconds,
        "checkpoint_seconds": settings.checkpoint_seconds,
        "background_saves": settings.background_saves,
        "seconds_between_saves": settings.save_seconds,
        "emergency_save_fits": plan.emergency_save_fits,
        "hours": plan.hours,
    }
    if price is not None:
        answer["cost"] = {key: price * hours for key, hours in plan.hours.items()}
    return answer


def _sizes(
    parts: dict[str, float], total: Callable[[Iterable[float]], float], available: float | None
) -> dict[str, float | None]:
    return parts | {"total": total(parts.values()), "available": available}


def as_table(plan: Plan, price: float | None, commands: bool = True) -> str:
    """The plan as a text table, with or without the command to type."""
    machine, settings, load = plan.machine, plan.settings, plan.load
    device = "CPU rank" if machine.is_cpu else machine.gpu
    total, seconds = sum(plan.gpu_memory_gib.values()), plan.step_seconds
    sizes = remote_gib(plan.model, settings, plan.steps)
    split = f", at most {settings.max_tokens:,} tokens at once" if settings.max_tokens else ""
    lines = [
        f"{plan.model.name} ({_count(plan.model.parameters)} parameters) on {machine.name}: "
        f"{settings.ranks} x {device}, {settings.precision}",
        *_adapter_lines(plan),
        f"{settings.rows} rows a device x {settings.ranks} x {settings.accumulation} = {settings.global_batch} a step, "
        f"{settings.batching}, "
        f"gradient checkpointing {'on' if settings.checkpointing else 'off'}{split}",
        "",
        f"memory of each {device}, GiB",
        *(_line(name, value) for name, value in plan.gpu_memory_gib.items() if value),
        _line("total", total, None if machine.is_cpu else machine.gpu_memory_gib),
        "activations and logits, GiB",
        *(_line(name, value) for name, value in plan.activations_gib.items()),
        "host memory, GiB",
        *(_line(name, value, machine.host_gib) for name, value in plan.host_memory_gib.items()),
        "disk, GiB",
        *(_line(name, value) for name, value in plan.disk_gib.items()),
        _line("total", sum(plan.disk_gib.values()), machine.disk_gib),
        *(["copied to --checkpoint-to, GiB"] if sizes else []),
        *(_line(name, value) for name, value in sizes.items()),
        f"an epoch{_several(settings.options.training_dataset)}",
        f"  {_number(load.steps, 'step')} of {_short_time(sum(seconds.values()))}: "
        + ", ".join(f"{name} {_short_time(value)}" for name, value in seconds.items() if value),
        f"  {load.real_tokens:,} real tokens of {load.computed_tokens:,} computed "
        f"({load.real_tokens / load.computed_tokens:.0%}); {load.real_tokens / load.paced_tokens:.0%} "
        "of what the devices could compute in the time of the slowest",
        *_run_lines(plan, price),
    ]
    lines += [_save_line(plan), ""]
    if plan.warning:
        lines.append(f"WARNING: {plan.warning}")
    lines += _file_lines(plan)
    if plan.fits:
        left = machine.gpu_memory_gib - total
        room = "" if machine.is_cpu else f", with {left:.1f} GiB of each {device} left"
        return printable("\n".join([*lines, f"FITS{room}", *([f"  {plan.command}"] if commands else [])]))
    lines += ["DOES NOT FIT", *(f"  {problem}" for problem in plan.problems)]
    if plan.nearest and commands:
        there = plan.nearest.machine.name
        lines += [
            f"This run fits{'' if there == machine.name else f' on {there}'}:",
            f"  {plan.nearest.command}",
        ]
    return printable("\n".join(lines))


def _several(sources: Sequence[str]) -> str:
    """The names of the sources, if there are several."""
    return f" of {joined(sources)}" if len(sources) > 1 else ""


def _adapter_lines(plan: Plan) -> list[str]:
    settings = plan.settings
    if not settings.lora:
        return []
    trained = trained_parameters(plan.model, settings)
    base = "in 4 bits" if settings.options.quantize else f"in {settings.precision}"
    return [
        f"adapters of rank {settings.options.lora} ({_count(trained)} trained parameters) on a base {base}"
    ]


def _save_line(plan: Plan) -> str:
    """How often a checkpoint is written, how long that takes, and whether SIGTERM leaves enough time for one."""
    options, step = plan.settings.options, sum(plan.step_seconds.values())
    every = options.save_steps or steps_between_saves(plan.settings.save_seconds, step, options.eval_steps)
    count = checkpoints(plan.settings.with_save_steps(every), plan.steps)
    between = min(every, plan.steps)
    seconds, where = plan.settings.checkpoint_seconds, "in the background"
    if not plan.settings.background_saves:
        where = "while training waits, because host memory is too small for copies"
    fits = "fits into" if plan.emergency_save_fits else "does not fit into"
    return (
        f"  {_number(count, 'checkpoint')}, one every {_number(between, 'step')}: a kill costs at most "
        f"{duration(between * step)} and a new start\n"
        f"  each is written in {_short_time(seconds)} {where}; one after SIGTERM {fits} the "
        f"{STOP_SECONDS:.0f} s that launchers give"
    )


def _file_lines(plan: Plan) -> list[str]:
    """The shipped DeepSpeed files with memory and time, and what to type for the fastest one."""
    if not plan.files:
        return []
    unit, size = time_unit(3600 * plan.hours["expected"])
    lines = [f"{'DeepSpeed file':<40}{'GiB':>9}{unit:>9}"]
    for file, other in plan.files.items():
        gib, time = sum(other.gpu_memory_gib.values()), 3600 * other.hours["expected"] / size
        lines.append(f"  {file:<38}{gib:>9.2f}{time:>9,.1f}{'' if other.fits else '  does not fit'}")
    best = fastest(plan.files)
    if plan.fits and plan.hours["expected"] <= (plan.files[best] if best else plan).hours["expected"]:
        lines.append("The run uses the fastest that fits.")  # it may be the user's own
    elif best:
        lines.append(f"The fastest that fits: type --deepspeed {best}")
    return [*lines, ""]


def _line(name: str, value: float, available: float | None = None) -> str:
    number = f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"  # small models have parts under 0.1 GiB
    return f"  {name:<28}{number:>9}" + ("" if available is None else f"  of {available:,.1f}")


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e8 else f"{parameters / 1e6:.2f} million"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _short_time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a person reads a run of this length, and its seconds."""
    if seconds >= 2 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds >= 120 else ("seconds", 1.0)


def _run_lines(plan: Plan, price: float | None) -> list[str]:
    """The time of the complete run by part, its range, and its cost."""
    unit, size = time_unit(3600 * plan.hours["expected"])
    digits = 0 if unit == "seconds" else 1
    bounds = [f"{3600 * plan.hours[key] / size:,.{digits}f}" for key in ("low", "expected", "high")]
    line = f"  between {bounds[0]} and {bounds[2]} {unit}"
    if price is not None:
        low, expected, high = (f"{price * plan.hours[key]:,.2f}" for key in ("low", "expected", "high"))
        line += f"; at {price:g} an hour it costs {expected}, between {low} and {high}"
    return [
        f"the run of {_number(plan.steps, 'step')}, {unit}",
        *(f"  {name:<28}{part / size:>9,.{digits}f}" for name, part in plan.run_seconds.items() if part),
        f"  {'total':<28}{bounds[1]:>9}",
        line,
    ]


def draw(plan: Plan, file: Path) -> None:
    """Draws the memory of a device, against its capacity, and the time of the run by part into an image file."""
    settings, machine = plan.settings, plan.machine
    unit, size = time_unit(3600 * plan.hours["expected"])
    draw_plan(
        plan.gpu_memory_gib,
        machine.gpu_memory_gib,
        "CPU rank" if machine.is_cpu else machine.gpu,
        {name: seconds / size for name, seconds in plan.run_seconds.items()},
        unit,
        f"{plan.model.name} on {machine.name}, {settings.batching}, "
        f"checkpointing {'on' if settings.checkpointing else 'off'}: "
        f"{sum(plan.gpu_memory_gib.values()):.1f} GiB, {'fits' if plan.fits else 'does not fit'}",
        file,
    )
