"""Builds the plan of a run: memory, disk, time, what is short, the smallest change that makes it fit, the command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from training.consts import GIB, STOP_SECONDS
from training.errors import OptionsError
from training.machine.catalogue import GPUS, Machine, find_family
from training.machine.cores import binding_words
from training.machine.local import THIS_MACHINE
from training.options.command_line import option_words
from training.options.settings import Settings, defaults_of, resolve
from training.options.trainer_options import TrainingOptions, flag_of, steps_between_saves
from training.plan.epoch import Lengths, Load, epoch_load
from training.plan.memory import (
    CPU_PROCESS_GIB,
    auto_max_tokens_per_device,
    device_memory,
    disk,
    host_memory,
    peak_activation_bytes,
    with_fastest_choices,
)
from training.plan.model_shape import ModelShape
from training.plan.overhead import (
    checkpoints,
    evaluations,
    finish_seconds,
    start_seconds,
)
from training.plan.presets import rows_and_accumulation, shipped_files
from training.plan.saves import blocked_seconds, with_saves
from training.plan.timing import CPU_RANGE, GPU_RANGE, cpu_rate, evaluation_seconds, step_seconds

if TYPE_CHECKING:
    from training.model.packing import Packing

NOTICED_GIB = 0.1  # an idle GPU may report a few MiB as used


@dataclass(frozen=True)
class Plan:
    """Predicted memory, disk and time of a run on a machine.

    Attributes:
        settings: the run's settings, with "auto" resolved: `checkpointing` and `whole_blocks` are bool, `max_tokens` int
            or None.
        gpu_memory_gib: memory of one device by part. On a CPU machine this is host memory and also counted there.
        activations_gib: activations and logits "with checkpointing" and "without checkpointing".
        host_memory_gib: "loading" and "training", and what of it are the copies of a checkpoint if saves run in the
            background (`settings.background_saves`).
        disk_gib: by part.
        step_seconds: seconds of one optimizer step by part.
        steps: of the complete run.
        run_seconds: seconds of the complete run by part, in the order in which they pass; `steps` of them are "steps".
        hours: "low", "expected", "high" of the complete run; "expected" is the sum of `run_seconds`.
        shortages: maps "GPU memory", "host memory" or "disk" to a sentence; empty if the run fits.
        changes: maps each shortage to the smallest change that removes it.
        warning: what padding costs, if packing was requested and the model cannot be packed; else empty.
        files: the plans of this run with each shipped DeepSpeed file of its precision; empty if they are not compared.
    """

    model: ModelShape
    machine: Machine
    settings: Settings
    load: Load
    gpu_memory_gib: dict[str, float]
    activations_gib: dict[str, float]
    host_memory_gib: dict[str, float]
    disk_gib: dict[str, float]
    step_seconds: dict[str, float]
    steps: int
    run_seconds: dict[str, float]
    hours: dict[str, float]
    shortages: dict[str, str]
    changes: dict[str, str]
    warning: str = ""
    files: dict[str, Plan] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def emergency_save_fits(self) -> bool:
        """Whether a checkpoint is complete before the launchers kill a stopped run."""
        return self.settings.checkpoint_seconds <= STOP_SECONDS

    @property
    def command(self) -> str:
        """The command that starts this run. On this machine it binds the ranks of an offloaded optimizer to cores."""
        here = self.machine.name == THIS_MACHINE and not self.machine.is_cpu
        bound = binding_words(self.settings.ranks) if here and self.settings.zero.offload_optimizer else ()
        return training_command(self.settings, bound)

    @property
    def problems(self) -> list[str]:
        """Each shortage with the smallest change that removes it; empty if the run fits."""
        return [f"{sentence}. {self.changes[kind]}" for kind, sentence in self.shortages.items()]


def plan_run(settings: Settings, lengths: Lengths, model: ModelShape, machine: Machine) -> Plan:
    """Plans a run on a machine, or on several such machines if the run has more ranks than the machine has devices.

    The plan's settings have "auto" resolved. A CPU's speed is measured unless `machine.flops` is set.
    Raises MachineError for an unknown GPU family.
    """
    if machine.is_cpu and not machine.flops:
        machine = replace(machine, flops=cpu_rate(model.width, settings.ranks))
    if model.obstacle and settings.packed and isinstance(settings.max_tokens, int):
        raise OptionsError(
            f"--max-tokens-per-device {settings.max_tokens} splits packed rows, and rows of {model.name} cannot be "
            f"packed: {model.obstacle}. Lower --per-device-train-batch-size and raise --gradient-accumulation-steps "
            "instead"
        )
    if settings.checkpointing is True and not model.checkpointing:
        raise OptionsError(
            f"--gradient-checkpointing on: transformers has none for {model.kind} models. "
            "Type --gradient-checkpointing off"
        )
    plan = _compute_plan(settings, lengths, model, machine)
    if plan.settings.batching == "length":
        packed = epoch_load(lengths, replace(settings, batching="packed"))
        plan = replace(
            plan,
            warning=f"rows of {model.name} are padded, not packed: {model.obstacle or 'the run started with padding'}. "
            f"The devices compute {plan.load.paced_tokens / packed.paced_tokens:.1f} times as many tokens",
        )
    return plan if plan.fits else replace(plan, changes=_nearest_changes(plan, settings, lengths))


def plan_files(
    settings: Settings, lengths: Lengths, model: ModelShape, machine: Machine, precision: str
) -> dict[str, Plan]:
    """The plan of the run with each shipped file of a precision. Empty on a CPU, or if the run uses no DeepSpeed."""
    options = settings.options
    if machine.is_cpu or not options.deepspeed_json or (options.bf16, options.fp16) != (None, None):
        return {}
    return {
        file: plan_run(
            resolve(replace(options, deepspeed=file, deepspeed_config=None), settings.ranks, precision),
            lengths,
            model,
            machine,
        )
        for file in shipped_files(precision)
    }


def fastest(plans: dict[str, Plan]) -> str | None:
    """The file with the shortest run among those that fit; None if none fits."""
    hours = {file: plan.hours["expected"] for file, plan in plans.items() if plan.fits}
    return min(hours, key=hours.__getitem__, default=None)


def with_packing(model: ModelShape, packing: Packing) -> ModelShape:
    """The shape with the result of `packing_of` for the model's architecture."""
    return replace(
        model,
        obstacle=packing.obstacle,
        response_loss=packing.response_loss,
        positions=packing.row_limit(model.positions),
        block=model.block if packing.whole_blocks else 0,
    )


def _compute_plan(settings: Settings, lengths: Lengths, model: ModelShape, machine: Machine) -> Plan:
    if model.obstacle:
        settings = settings.without_packing()
    load, share, cpu = epoch_load(lengths, settings), lengths.response_share, machine.is_cpu
    local = min(settings.ranks, machine.count)
    host = host_memory(model, settings, local, cpu)
    # CPU ranks share host memory with each other and with the buffers for saving.
    saving = host["training"] - local * CPU_PROCESS_GIB
    room = (machine.host_gib - saving) / local if cpu else machine.gpu_memory_gib
    settings = with_fastest_choices(model, settings, load, share, room, cpu)
    if settings.max_tokens == "auto":
        budget = auto_max_tokens_per_device(model, settings, load, share, room, cpu)
        settings = replace(settings, max_tokens=budget)
    gpu = device_memory(model, settings, load, share, cpu)
    activations = {
        f"{word} checkpointing": sum(peak_activation_bytes(model, settings, load, share, on)) / GIB
        for word, on in (("with", True), ("without", False))
    }
    if cpu:
        host["training"] += local * (sum(gpu.values()) - CPU_PROCESS_GIB)
    steps = settings.options.max_steps or math.ceil(settings.options.epochs * load.steps)
    seconds = step_seconds(model, machine, settings, load, share)
    step, evaluation = sum(seconds.values()), evaluation_seconds(model, machine, settings, load, seconds)
    settings, host = with_saves(model, machine, settings, host, step, evaluation, steps)
    # The run times its first steps itself; the plan counts with its own.
    every = steps_between_saves(settings.save_seconds, step, settings.options.eval_steps)
    spaced = settings.with_save_steps(settings.options.save_steps or every)
    # A slower run saves more often.
    most = settings.options.save_steps or max(1, int(every / (CPU_RANGE if cpu else GPU_RANGE)))
    stored = disk(model, settings.with_save_steps(most), steps)
    parts = _run_seconds(model, machine, spaced, load, seconds, steps)
    hours, factor = sum(parts.values()) / 3600, CPU_RANGE if cpu else GPU_RANGE
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
        steps=steps,
        run_seconds=parts,
        hours={"low": hours / factor, "expected": hours, "high": hours * factor},
        shortages=_shortages(machine, sum(gpu.values()), host, sum(stored.values())),
        changes={},
    )


def _run_seconds(
    model: ModelShape,
    machine: Machine,
    settings: Settings,
    load: Load,
    step: dict[str, float],
    steps: int,
) -> dict[str, float]:
    """Seconds of a run of `steps` steps by part, in the order in which they pass."""
    evaluation = evaluation_seconds(model, machine, settings, load, step)
    # The end of the run waits for the last one.
    blocked = (checkpoints(settings, steps) - 1) * blocked_seconds(model, machine, settings)
    return {
        **start_seconds(model, machine, settings, load),
        "steps": steps * sum(step.values()),
        "evaluations": evaluations(settings, steps) * evaluation,
        "checkpoints": blocked + settings.checkpoint_seconds,
        **finish_seconds(model, settings),
    }


def _shortages(
    machine: Machine, gpu_gib: float, host_gib: dict[str, float], disk_gib: float
) -> dict[str, str]:
    """Describes what the machine lacks, in numbers. A CPU rank has no memory of its own."""
    phase, gpu_room = max(host_gib, key=host_gib.__getitem__), machine.gpu_memory_gib
    others = f", because other processes use {machine.taken_gib:.1f} (nvidia-smi lists them)"
    taken = others if machine.taken_gib >= NOTICED_GIB else ""
    needs = (
        ("GPU memory", gpu_gib, math.inf if machine.is_cpu else gpu_room, f"on each {machine.gpu}", taken),
        ("host memory", host_gib[phase], machine.host_gib, f"while {phase}", f" of {machine.name}"),
        ("disk", disk_gib, machine.disk_gib, "for checkpoints, model and cache", f" of {machine.name}"),
    )
    return {
        kind: f"{kind}: {needed:.1f} GiB are needed {purpose}, {needed - room:.1f} more than "
        f"{'the' if kind != 'GPU memory' else 'its free' if owner else 'its'} {room:.1f}{owner}"
        for kind, needed, room, purpose, owner in needs
        if needed > room
    }


def _nearest_changes(failed: Plan, settings: Settings, lengths: Lengths) -> dict[str, str]:
    """For each shortage, the first change that removes it and adds no other. Options come before other machines."""
    candidates = [
        (change.advice, _compute_plan(_apply_change(settings, change), lengths, failed.model, change.machine))
        for change in [
            *_without_other_processes(failed),
            *_option_changes(failed),
            *_machine_changes(failed),
        ]
    ]
    nearest = {
        "GPU memory": f"No nearby change is enough: {failed.model.name} needs more or larger GPUs",
        "host memory": f"Use a machine with {math.ceil(max(failed.host_memory_gib.values()))} GiB of free host "
        "memory",
        "disk": f"Name a folder on a disk with {math.ceil(sum(failed.disk_gib.values()))} GiB free: "
        "--local-output-dir FOLDER",
    }
    for kind in failed.shortages:
        for advice, plan in candidates:
            if kind not in plan.shortages and plan.shortages.keys() <= failed.shortages.keys():
                nearest[kind] = advice
                break
    return {kind: nearest[kind] for kind in failed.shortages}


@dataclass(frozen=True)
class Change:
    """Changed options, ranks and machine of a run. `where` describes the machine if it is a different one."""

    options: dict[str, Any]
    ranks: int
    machine: Machine
    where: str = ""

    @property
    def advice(self) -> str:
        words = " ".join(f"{flag_of(name)} {value}" for name, value in self.options.items())
        if self.where:
            return f"It fits on {self.where}{' with ' if words else ''}{words}"
        return f"Type {words}"


def _apply_change(settings: Settings, change: Change) -> Settings:
    same_file = "deepspeed" not in change.options
    return resolve(
        replace(settings.options, **change.options),
        change.ranks,
        settings.precision if same_file else find_family(change.machine.family).precision,
        settings.deepspeed if same_file else None,
    )


def _checkpointing_option(plan: Plan) -> dict[str, Any]:
    possible = plan.model.checkpointing and not plan.settings.checkpointing
    return {"gradient_checkpointing": "on"} if possible else {}


def _offload_option(plan: Plan) -> dict[str, Any]:
    offload = find_family(plan.machine.family).offload
    return {"deepspeed": offload} if offload and not plan.settings.zero.offload_optimizer else {}


def _without_other_processes(failed: Plan) -> list[Change]:
    """The same GPUs, after the other processes on them have ended."""
    machine = failed.machine
    alone = replace(machine, gpu_memory_gib=machine.gpu_memory_gib + machine.taken_gib, taken_gib=0.0)
    change = Change({}, failed.settings.ranks, alone, "these GPUs if the other processes on them end")
    return [change] if machine.taken_gib >= NOTICED_GIB else []


def _option_changes(failed: Plan) -> list[Change]:
    """Changes of options only, smallest first."""
    settings, machine, recompute = failed.settings, failed.machine, _checkpointing_option(failed)
    ranks, changes = settings.ranks, [recompute]
    if settings.packed and settings.max_tokens is None:
        room = machine.host_gib / ranks if machine.is_cpu else machine.gpu_memory_gib
        slow = replace(settings, checkpointing=True)
        budget = auto_max_tokens_per_device(failed.model, slow, failed.load, 0.0, room, machine.is_cpu)
        changes.append(recompute | {"max_tokens_per_device": budget} if budget else {})
    own_file, offloaded = find_family(machine.family).deepspeed, settings.zero.offload_optimizer
    if settings.zero.stage in (1, 2):  # stage 3 also divides the weights
        changes.append({"deepspeed": own_file})
    if settings.options.save_total_limit > 1:
        changes.append({"save_total_limit": 1})
    for rows in (2**i for i in reversed(range(6)) if 2**i < settings.rows):
        steps = settings.accumulation * math.ceil(settings.rows / rows)
        changes.append(
            {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | recompute
        )
    if (settings.zero.stage == 0 and ranks > 1) or (
        offloaded and own_file != settings.options.deepspeed_json
    ):
        changes.append({"deepspeed": own_file})
    if offload := _offload_option(failed):
        changes.append(offload | recompute)
    return [Change(options, ranks, machine) for options in changes if options]


def _machine_changes(failed: Plan) -> list[Change]:
    """Changes of machine: larger GPUs of the same family, then more GPUs."""
    settings, machine = failed.settings, failed.machine
    recompute, offload = _checkpointing_option(failed), _offload_option(failed)
    ranks = settings.ranks
    if machine.is_cpu:
        return []
    total = machine.gpu_memory_gib + machine.taken_gib
    larger = replace(machine, taken_gib=0.0)
    changes = [
        Change(recompute, ranks, replace(larger, gpu=name, gpu_memory_gib=gpu.memory_gib), f"{ranks} {name}")
        for name, gpu in GPUS.items()
        if gpu.family == machine.family and gpu.memory_gib > total + 1
    ]
    for count in (count for count in (2, 3, 4, 8, 16, 32) if count > ranks):
        rows, steps = rows_and_accumulation(settings.global_batch, count, settings.batching)
        spread = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | recompute
        for options in [spread, offload | spread] if offload else [spread]:
            changes.append(Change(options, count, replace(machine, count=count), f"{count} {machine.gpu}"))
    return changes


def training_command(settings: Settings, launcher_options: Sequence[str] = ()) -> str:
    """The shell command that starts this run, without options that have the trainer's defaults.

    `launcher_options` are options of `deepspeed`, which a run without it leaves out.
    """
    options = settings.options
    if options.deepspeed_json:
        words = ["deepspeed", *launcher_options, "--num_gpus", str(settings.ranks)]
        words += ["--module", "training.trainer"]
    elif settings.ranks > 1:
        words = ["torchrun", f"--nproc_per_node={settings.ranks}", "-m", "training.trainer"]
    else:
        words = ["python", "-m", "training.trainer"]
    chosen = {option.name: getattr(options, option.name) for option in fields(TrainingOptions)}
    chosen |= {"deepspeed": options.deepspeed_json, "deepspeed_config": None, "local_rank": -1}
    defaults = defaults_of(options)
    words += option_words({name: value for name, value in chosen.items() if value != defaults[name]})
    return shlex.join(words)
