"""Builds the plan of a run: memory, disk, time, what is short, and the smallest change that makes it fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from training.consts import GIB, STOP_SECONDS
from training.errors import OptionsError
from training.machine.catalogue import Machine
from training.machine.cores import binding_words
from training.machine.local import THIS_MACHINE
from training.options.intervals import steps_between_saves
from training.options.settings import Settings, resolve
from training.plan.changes import NOTICED_GIB, apply_change, possible_changes, training_command
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
from training.plan.presets import shipped_files
from training.plan.saves import blocked_seconds, with_saves
from training.plan.timing import CPU_RANGE, GPU_RANGE, cpu_rate, evaluation_seconds, step_seconds

if TYPE_CHECKING:
    from training.model.packing import Packing


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
        nearest: the plan after the smallest change with which the run fits; None if it fits, or if none is near.
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
    nearest: Plan | None = None
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
        command = training_command(self.settings, bound)
        # Without a launcher one process would use every GPU that it sees.
        only = self.machine.count > self.settings.ranks == 1 and not self.settings.deepspeed
        return f"CUDA_VISIBLE_DEVICES=0 {command}" if only and not self.machine.is_cpu else command

    @property
    def problems(self) -> list[str]:
        """Each shortage with the smallest change that removes it; empty if the run fits."""
        return [f"{sentence}. {self.changes[kind]}" for kind, sentence in self.shortages.items()]


def plan_run(settings: Settings, lengths: Lengths, model: ModelShape, machine: Machine) -> Plan:
    """Plans a run on a machine, or on several such machines if the run has more ranks than the machine has devices.

    The plan's settings have "auto" resolved. A CPU's speed is measured unless `machine.flops` is set.

    Raises MachineError for an unknown GPU family, OptionsError for options that the model cannot have.
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
    return plan if plan.fits else _with_nearest_changes(plan, settings, lengths)


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
    """The plan of a run with "auto" resolved, without the changes that would make it fit."""
    if model.obstacle:
        settings = settings.without_packing()
    load, response_share, cpu = epoch_load(lengths, settings), lengths.response_share, machine.is_cpu
    local_ranks = min(settings.ranks, machine.count)
    host = host_memory(model, settings, local_ranks, cpu)
    room = machine.gpu_memory_gib
    if cpu:  # the ranks share host memory with each other and with the buffers for saving
        saving = host["training"] - local_ranks * CPU_PROCESS_GIB
        room = (machine.host_gib - saving) / local_ranks
    settings = with_fastest_choices(model, settings, load, response_share, room, cpu)
    if settings.max_tokens == "auto":
        budget = auto_max_tokens_per_device(model, settings, load, response_share, room, cpu)
        settings = replace(settings, max_tokens=budget)
    gpu = device_memory(model, settings, load, response_share, cpu)
    activations = {
        f"{word} checkpointing": sum(peak_activation_bytes(model, settings, load, response_share, on)) / GIB
        for word, on in (("with", True), ("without", False))
    }
    if cpu:
        host["training"] += local_ranks * (sum(gpu.values()) - CPU_PROCESS_GIB)
    steps = settings.options.max_steps or math.ceil(settings.options.epochs * load.steps)
    step_parts = step_seconds(model, machine, settings, load, response_share)
    step = sum(step_parts.values())
    evaluation = evaluation_seconds(model, machine, settings, load, step_parts)
    settings, host = with_saves(model, machine, settings, host, step, evaluation, steps)
    accuracy = CPU_RANGE if cpu else GPU_RANGE
    # The run times its first steps itself; the plan counts with its own. A run that is slower than planned saves after
    # fewer steps, and its disk must hold these checkpoints as well.
    typed = settings.options.save_steps
    every = typed or steps_between_saves(settings.save_seconds, step, settings.options.eval_steps)
    stored = disk(model, settings.with_save_steps(typed or max(1, int(every / accuracy))), steps)
    run_parts = _run_seconds(model, machine, settings.with_save_steps(every), load, step_parts, steps)
    hours = sum(run_parts.values()) / 3600
    return Plan(
        model=model,
        machine=machine,
        settings=settings,
        load=load,
        gpu_memory_gib=gpu,
        activations_gib=activations,
        host_memory_gib=host,
        disk_gib=stored,
        step_seconds=step_parts,
        steps=steps,
        run_seconds=run_parts,
        hours={"low": hours / accuracy, "expected": hours, "high": hours * accuracy},
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
    gpu_room = math.inf if machine.is_cpu else machine.gpu_memory_gib
    of_gpu = f"its {gpu_room:.1f}"
    if machine.taken_gib >= NOTICED_GIB:
        others = f"other processes use {machine.taken_gib:.1f} (nvidia-smi lists them)"
        of_gpu = f"its free {gpu_room:.1f}, because {others}"
    phase = max(host_gib, key=host_gib.__getitem__)
    of_host, of_disk = (f"the {gib:.1f} of {machine.name}" for gib in (machine.host_gib, machine.disk_gib))
    needs = (
        ("GPU memory", gpu_gib, gpu_room, f"on each {machine.gpu}", of_gpu),
        ("host memory", host_gib[phase], machine.host_gib, f"while {phase}", of_host),
        ("disk", disk_gib, machine.disk_gib, "for checkpoints, model and cache", of_disk),
    )
    return {
        kind: f"{kind}: {needed:.1f} GiB are needed {purpose}, {needed - room:.1f} more than {available}"
        for kind, needed, room, purpose, available in needs
        if needed > room
    }


def _with_nearest_changes(failed: Plan, settings: Settings, lengths: Lengths) -> Plan:
    """`failed` with the first change for each shortage that removes it and adds no other, and the first plan that fits."""
    candidates = [
        (change, _compute_plan(apply_change(settings, change), lengths, failed.model, change.machine))
        for change in possible_changes(failed)
    ]
    nearest = {
        "GPU memory": f"No nearby change is enough: {failed.model.name} needs more or larger GPUs",
        "host memory": f"Use a machine with {math.ceil(max(failed.host_memory_gib.values()))} GiB of free host "
        "memory",
        "disk": f"Name a folder on a disk with {math.ceil(sum(failed.disk_gib.values()))} GiB free: "
        "--local-output-dir FOLDER",
    }
    for kind in failed.shortages:
        for change, plan in candidates:
            if kind == "disk" and change.trains_adapters:  # another disk is nearer
                continue
            if kind not in plan.shortages and plan.shortages.keys() <= failed.shortages.keys():
                nearest[kind] = change.advice
                break
    return replace(
        failed,
        changes={kind: nearest[kind] for kind in failed.shortages},
        nearest=next((plan for _, plan in candidates if plan.fits), None),
    )
