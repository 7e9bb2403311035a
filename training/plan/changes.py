"""Changes of a run that may make it fit, smallest first, and the command that starts a run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from training.machine.catalogue import GPUS, MACHINES, Machine, find_family
from training.options.command_line import option_words
from training.options.settings import Settings, defaults_of, resolve
from training.options.trainer_options import TrainingOptions, flag_of
from training.plan.memory import auto_max_tokens_per_device
from training.plan.presets import LORA_RANK, lora_file, rows_and_accumulation

if TYPE_CHECKING:
    from training.plan.fit import Plan

NOTICED_GIB = 0.1  # an idle GPU may report a few MiB as used


@dataclass(frozen=True)
class Change:
    """Changed options, ranks and machine of a run.

    Attributes:
        options: new values by name of TrainingOptions; None: the option is left out.
        where: describes the machine if it is a different one.
    """

    options: dict[str, Any]
    ranks: int
    machine: Machine
    where: str = ""

    @property
    def advice(self) -> str:
        """What to type, or where the run fits and with which options."""
        typed = " ".join(
            f"{flag_of(name)} {value}" for name, value in self.options.items() if value is not None
        )
        left_out = " and ".join(flag_of(name) for name, value in self.options.items() if value is None)
        without = f", without {left_out}" if left_out else ""
        if self.where:
            return f"It fits on {self.where}{f' with {typed}' if typed else ''}{without}"
        return f"Type {typed}{without}" if typed else f"Leave out {left_out}"

    @property
    def trains_adapters(self) -> bool:
        """Whether it is another method of training."""
        return "lora" in self.options or "quantize" in self.options


def apply_change(settings: Settings, change: Change) -> Settings:
    """The settings of the changed run. Defaults of the method, such as --lr, become those of the new method."""
    same_file = "deepspeed" not in change.options
    options, defaults = settings.options, defaults_of(settings.options)
    method: dict[str, Any] = {
        name: None for name in ("lr", "lora_alpha") if getattr(options, name) == defaults[name]
    }
    return resolve(
        replace(options, **method, **change.options),
        change.ranks,
        settings.precision if same_file else find_family(change.machine.family).precision,
        settings.deepspeed if same_file else None,
    )


def possible_changes(failed: Plan) -> list[Change]:
    """Changes of a plan that does not fit. Options come before adapters, and those before other machines."""
    return [
        *_without_other_processes(failed),
        *_option_changes(failed),
        *_adapter_changes(failed, failed.machine),
        *_machine_changes(failed),
    ]


def _checkpointing_option(plan: Plan) -> dict[str, Any]:
    possible = plan.model.checkpointing and not plan.settings.checkpointing
    return {"gradient_checkpointing": "on"} if possible else {}


def _offload_option(plan: Plan) -> dict[str, Any]:
    offload = find_family(plan.machine.family).offload
    useful = offload and not plan.settings.zero.offload_optimizer and not plan.settings.lora
    return {"deepspeed": offload} if useful else {}


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
    own_file: str | None = find_family(machine.family).deepspeed
    offloaded = settings.zero.offload_optimizer
    if settings.lora:
        own_file = lora_file(machine.family, ranks, whole_weights=False)
    if settings.zero.stage in (1, 2) and not settings.options.quantize:  # stage 3 also divides the weights
        changes.append({"deepspeed": own_file})
    if settings.options.save_total_limit > 1:
        changes.append({"save_total_limit": 1})
    for rows in (2**i for i in reversed(range(6)) if 2**i < settings.rows):
        steps = settings.accumulation * math.ceil(settings.rows / rows)
        changes.append(
            {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | recompute
        )
    if (settings.zero.stage == 0 and ranks > 1) or (
        offloaded and own_file != settings.options.deepspeed_json and not settings.lora
    ):
        changes.append({"deepspeed": own_file})
    if offload := _offload_option(failed):
        changes.append(offload | recompute)
    return [Change(options, ranks, machine) for options in changes if options]


def _adapter_changes(failed: Plan, machine: Machine, where: str = "") -> list[Change]:
    """Adapters on a frozen base (LoRA) instead of full tuning, then on a base in 4 bits, which one device trains."""
    settings = failed.settings
    if machine.is_cpu or not failed.model.linears:
        return []
    changes = []
    for quantize, ranks in ((None, settings.ranks), ("nf4", 1)):
        if settings.lora and (quantize is None or settings.options.quantize):
            continue
        rows, steps = rows_and_accumulation(settings.global_batch, ranks, settings.batching)
        options: dict[str, Any] = {} if settings.lora else {"lora": LORA_RANK}
        if quantize:
            options["quantize"] = quantize
        options |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        file = lora_file(machine.family, ranks)
        if file != settings.options.deepspeed_json:
            options["deepspeed"] = file
        on_one = f"one {machine.gpu}" if ranks < settings.ranks else ""
        changes.append(
            Change(options, ranks, machine, f"{where or machine.name}, on {on_one}," if on_one else where)
        )
    return changes


def _machine_changes(failed: Plan) -> list[Change]:
    """Changes of machine: more host memory beside the same GPUs, larger GPUs of the same kind, then more GPUs."""
    settings, machine = failed.settings, failed.machine
    recompute, offload = _checkpointing_option(failed), _offload_option(failed)
    ranks = settings.ranks
    if machine.is_cpu:
        return []
    changes = []
    for host in _with_more_host_memory(machine):
        for options in [{}, offload | recompute] if offload else [{}]:
            changes.append(Change(options, ranks, host, host.name))
        changes += _adapter_changes(failed, host, host.name)
    total = machine.gpu_memory_gib + machine.taken_gib
    changes += [
        Change(
            recompute,
            ranks,
            replace(machine, taken_gib=0.0, gpu=name, gpu_memory_gib=gpu.memory_gib, flops=gpu.flops),
            f"{ranks} {name}",
        )
        for name, gpu in GPUS.items()
        if (gpu.family, gpu.link) == (machine.family, machine.link) and gpu.memory_gib > total + 1
    ]
    if settings.options.quantize:  # one device
        return changes
    for count in (count for count in (2, 3, 4, 8, 16, 32) if count > ranks):
        rows, steps = rows_and_accumulation(settings.global_batch, count, settings.batching)
        spread = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps} | recompute
        if settings.lora and not settings.deepspeed:
            spread["deepspeed"] = lora_file(machine.family, count)
        for options in [spread, offload | spread] if offload else [spread]:
            changes.append(Change(options, count, replace(machine, count=count), f"{count} {machine.gpu}"))
    return changes


def _with_more_host_memory(machine: Machine) -> list[Machine]:
    """Machines of the same cloud and series with the same GPUs and more host memory, smallest first."""
    series = machine.name.rpartition("." if "." in machine.name else "-")[0]
    return sorted(
        (
            other
            for other in MACHINES.values()
            if series and other.name.startswith(series) and other.name != machine.name
            if (other.gpu, other.count) == (machine.gpu, machine.count) and other.host_gib > machine.host_gib
        ),
        key=lambda other: other.host_gib,
    )


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
