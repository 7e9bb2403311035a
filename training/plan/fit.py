"""Whether a run fits on a machine: the plan, what is short, the nearest change that makes it fit, and what to type."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields, replace
from typing import Any

from training.consts import GIB
from training.data.rows import too_few_rows
from training.errors import OptionsError
from training.machine.catalogue import GPUS, Machine, find_family
from training.options.command_line import option_words
from training.options.settings import Settings, resolve
from training.options.trainer_options import TrainingOptions, flag_of
from training.plan.epoch import Lengths, Load, epoch_load
from training.plan.lookup import dataset_lengths, model_shape
from training.plan.memory import (
    CPU_PROCESS_GIB,
    auto_gradient_checkpointing,
    auto_max_tokens_per_device,
    device_memory,
    disk,
    host_memory,
    peak_activation_bytes,
)
from training.plan.model_shape import ModelShape
from training.plan.presets import rows_and_accumulation
from training.plan.timing import CPU_RANGE, GPU_RANGE, cpu_rate, hours_of, step_seconds


@dataclass(frozen=True)
class Plan:
    """A run on a machine, in numbers.

    Attributes:
        settings: with `checkpointing` (bool) and `max_tokens` (int or None) decided.
        gpu_memory_gib: of one device by part. On a CPU machine it is host memory and counts there as well.
        activations_gib: activations and logits "with checkpointing" and "without checkpointing".
        host_memory_gib: "loading" and "training".
        disk_gib: by part.
        step_seconds: of one optimizer step by part.
        hours_per_epoch: "low", "expected", "high".
        steps, hours: of the whole run; the latter as those of an epoch.
        shortages: kind ("GPU memory", "host memory", "disk") to a sentence; empty if it fits.
        changes: for each kind the nearest change that makes it fit.
        command: what to type for this run.
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
    hours_per_epoch: dict[str, float]
    steps: int
    hours: dict[str, float]
    shortages: dict[str, str]
    changes: dict[str, str]
    command: str

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def problems(self) -> list[str]:
        """What is short, by how much, and the nearest change that makes it fit; empty if it fits."""
        return [f"{sentence}. {self.changes[kind]}" for kind, sentence in self.shortages.items()]


def plan_run(settings: Settings, lengths: Lengths, model: ModelShape, machine: Machine) -> Plan:
    """Weighs a run against a machine, or several of its kind where it has fewer devices than the run has ranks.

    What is "auto" in the settings is decided in those of the plan. A CPU's speed is measured, unless `machine` has one.
    Raises MachineError for a machine of an unknown GPU family.
    """
    if machine.is_cpu and not machine.flops:
        machine = replace(machine, flops=cpu_rate(model.width, settings.ranks))
    plan = _weigh(settings, lengths, model, machine)
    return plan if plan.fits else replace(plan, changes=_nearest_changes(plan, settings, lengths))


def plan_options(options: TrainingOptions, ranks: int, machine: Machine) -> Plan:
    """The plan of a run by the trainer's options: model and rows are looked up by their names.

    Raises MachineError for a machine of an unknown GPU family; OptionsError for options that cannot be used there;
    ModelError or DataError where model or dataset cannot be loaded.
    """
    family, model = find_family(machine.family), model_shape(options.input_model)
    settings = resolve(options, ranks, family.precision)
    if family.precision == "fp16" and settings.precision == "bf16":
        raise OptionsError(
            f"a {' or '.join(family.devices)} cannot compute in bf16. Type --deepspeed {family.deepspeed}"
        )
    lengths = dataset_lengths(options.training_dataset, model)
    count = len(lengths.tokens)
    if count < 2:
        raise OptionsError(f"--training-dataset: {too_few_rows(count)}. Name one with more")
    if options.test_size >= count:
        raise OptionsError(f"--test-size {options.test_size:,} of {count:,} rows leaves none to train on")
    return plan_run(settings, lengths, model, machine)


def _weigh(settings: Settings, lengths: Lengths, model: ModelShape, machine: Machine) -> Plan:
    load, share, cpu = epoch_load(lengths, settings), lengths.response_share, machine.is_cpu
    local = min(settings.ranks, machine.count)
    host = host_memory(model, settings, local, cpu)
    # Ranks on a CPU share the host's memory with each other, and with what saving takes.
    saving = host["training"] - local * CPU_PROCESS_GIB
    room = (machine.host_gib - saving) / local if cpu else machine.gpu_memory_gib
    if settings.checkpointing == "auto":
        recompute = auto_gradient_checkpointing(model, settings, load, share, room, cpu)
        settings = replace(settings, checkpointing=recompute)
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
    stored = disk(model, settings, steps)
    seconds = step_seconds(model, machine, settings, load, share)
    factor = CPU_RANGE if cpu else GPU_RANGE
    epoch, run = (
        {"low": hours / factor, "expected": hours, "high": hours * factor}
        for hours in (hours_of(model, settings, load, seconds, count) for count in (load.steps, steps))
    )
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
        hours_per_epoch=epoch,
        steps=steps,
        hours=run,
        shortages=_shortages(machine, sum(gpu.values()), host, sum(stored.values())),
        changes={},
        command=command(settings),
    )


def _shortages(
    machine: Machine, gpu_gib: float, host_gib: dict[str, float], disk_gib: float
) -> dict[str, str]:
    """What the machine lacks, each with the numbers. A CPU rank has no memory of its own."""
    phase, gpu_room = max(host_gib, key=host_gib.__getitem__), machine.gpu_memory_gib
    needs = (
        ("GPU memory", gpu_gib, math.inf if machine.is_cpu else gpu_room, f"on each {machine.gpu}", ""),
        ("host memory", host_gib[phase], machine.host_gib, f"while {phase}", f" of {machine.name}"),
        ("disk", disk_gib, machine.disk_gib, "for checkpoints, model and cache", f" of {machine.name}"),
    )
    return {
        kind: f"{kind}: {needed:.1f} GiB are needed {purpose}, {needed - room:.1f} more than "
        f"{'the' if owner else 'its'} {room:.1f}{owner}"
        for kind, needed, room, purpose, owner in needs
        if needed > room
    }


def _nearest_changes(failed: Plan, settings: Settings, lengths: Lengths) -> dict[str, str]:
    """For each shortage the first change that ends it and causes no other. Options come before other machines."""
    tried = [
        (change.advice, _weigh(_changed(settings, change), lengths, failed.model, change.machine))
        for change in [*_other_options(failed), *_other_machines(failed)]
    ]
    nearest = {
        "GPU memory": f"Nothing near it fits: {failed.model.name} needs more GPUs or larger ones",
        "host memory": f"A machine with {math.ceil(max(failed.host_memory_gib.values()))} GiB of free host "
        "memory would do",
        "disk": f"Name a folder on a disk with {math.ceil(sum(failed.disk_gib.values()))} GiB free: "
        "--local-output-dir FOLDER",
    }
    for kind in failed.shortages:
        for advice, plan in tried:
            if kind not in plan.shortages and plan.shortages.keys() <= failed.shortages.keys():
                nearest[kind] = advice
                break
    return {kind: nearest[kind] for kind in failed.shortages}


@dataclass(frozen=True)
class Change:
    """Another way to run: options by their names, ranks, and a machine; `where` names it if it is another one."""

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


def _changed(settings: Settings, change: Change) -> Settings:
    same_file = "deepspeed" not in change.options
    return resolve(
        replace(settings.options, **change.options),
        change.ranks,
        settings.precision if same_file else find_family(change.machine.family).precision,
        settings.deepspeed if same_file else None,
    )


def _saving(plan: Plan) -> dict[str, Any]:
    return {} if plan.settings.checkpointing else {"gradient_checkpointing": "on"}


def _offload(plan: Plan) -> dict[str, Any]:
    offload = find_family(plan.machine.family).offload
    return {"deepspeed": offload} if offload and not plan.settings.zero.offload_optimizer else {}


def _other_options(failed: Plan) -> list[Change]:
    """Changes of the options alone, the smallest first."""
    settings, machine, saving = failed.settings, failed.machine, _saving(failed)
    ranks, changes = settings.ranks, [saving]
    if settings.packed and settings.max_tokens is None:
        room = machine.host_gib / ranks if machine.is_cpu else machine.gpu_memory_gib
        slow = replace(settings, checkpointing=True)
        budget = auto_max_tokens_per_device(failed.model, slow, failed.load, 0.0, room, machine.is_cpu)
        changes.append(saving | {"max_tokens_per_device": budget} if budget else {})
    if settings.options.save_total_limit > 1:
        changes.append({"save_total_limit": 1})
    for rows in (2**i for i in reversed(range(6)) if 2**i < settings.rows):
        steps = settings.accumulation * math.ceil(settings.rows / rows)
        changes.append({"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | saving)
    own_file, offloaded = find_family(machine.family).deepspeed, settings.zero.offload_optimizer
    if (settings.zero.stage == 0 and ranks > 1) or (
        offloaded and own_file != settings.options.deepspeed_json
    ):
        changes.append({"deepspeed": own_file})
    if offload := _offload(failed):
        changes.append(offload | saving)
    return [Change(options, ranks, machine) for options in changes if options]


def _other_machines(failed: Plan) -> list[Change]:
    """Larger GPUs of the family, then more of the same."""
    settings, machine, saving, offload = failed.settings, failed.machine, _saving(failed), _offload(failed)
    ranks = settings.ranks
    if machine.is_cpu:
        return []
    found = [
        Change(saving, ranks, replace(machine, gpu=name, gpu_memory_gib=gpu.memory_gib), f"{ranks} {name}")
        for name, gpu in GPUS.items()
        if gpu.family == machine.family and gpu.memory_gib > machine.gpu_memory_gib + 1
    ]
    for count in (count for count in (2, 3, 4, 8, 16, 32) if count > ranks):
        rows, steps = rows_and_accumulation(settings.global_batch, count, settings.options.batching)
        spread = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | saving
        for options in [spread, offload | spread] if offload else [spread]:
            found.append(Change(options, count, replace(machine, count=count), f"{count} {machine.gpu}"))
    return found


def command(settings: Settings) -> str:
    """What to type for this run; options that are the trainer's defaults are left out."""
    options = settings.options
    if options.deepspeed_json:
        words = ["deepspeed", "--num_gpus", str(settings.ranks), "--module", "training.trainer"]
    elif settings.ranks > 1:
        words = ["torchrun", f"--nproc_per_node={settings.ranks}", "-m", "training.trainer"]
    else:
        words = ["python", "-m", "training.trainer"]
    chosen = {option.name: getattr(options, option.name) for option in fields(TrainingOptions)}
    chosen |= {"deepspeed": options.deepspeed_json, "deepspeed_config": None, "local_rank": -1}
    defaults = {option.name: option.default for option in fields(TrainingOptions)}
    words += option_words({name: value for name, value in chosen.items() if value != defaults[name]})
    return shlex.join(words)
