"""Resources of the training pod: CPUs, GPUs, memory, disk and shared memory, taken from the plan.

Metaflow needs them before a run has parameters, so they are planned for Dolly's run, with adapters where full tuning does
not fit, or on "cpu" for the demo. A run that needs more is refused in its first step, with the numbers to type. This
module does not import torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from metaflow.exception import MetaflowException

from training.consts import GIB
from training.errors import MachineError
from training.machine.catalogue import Machine, find_family, find_machine
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.plan.epoch import alpaca_lengths
from training.plan.fit import Plan, plan_run
from training.plan.lookup import model_shape
from training.plan.presets import demo_options, method_options, preset_options

CPU_RANKS = 2
# NCCL keeps buffers between the GPUs of a node in /dev/shm, for which a container's default of 64 MiB is too small.
# 2 GiB a rank make 16 GiB for eight, as in training.launch.exits. Used shared memory counts as memory of the pod.
SHARED_GIB = 2.0
# For each rank, its supervisor and the threads of the offloaded Adam. Cloud machines have at least as many per GPU. A
# pod that requests more than its node has would wait forever.
CPUS_A_GPU = 4
DRIVER_GIB = 2.0  # the flow's process and card, DeepSpeed's launcher, Metaflow's sidecars
MARGIN = 1.1  # the plan's own accuracy
SHARE_OF_NODE = 0.95  # share of a machine's memory that pods can request. An assumption
KEYS = ("cpu", "gpu", "memory", "disk", "shared_memory")  # keys of Metaflow's @resources


class PodError(MetaflowException):
    """No machine can provide this pod. Metaflow shows the message without a traceback."""

    headline = "Cannot request this pod"


def is_remote() -> bool:
    """Whether this task runs on Kubernetes or Batch."""
    return "METAFLOW_KUBERNETES_WORKLOAD" in os.environ or "AWS_BATCH_JOB_ID" in os.environ


def parse_machine(name: str) -> str:
    """Parses the config "machine". Raises PodError with the known names."""
    return machine_of(name.strip()).name


def parse_resources(text: str) -> dict[str, int]:
    """Parses the config "resources", a JSON object of positive whole numbers. Raises PodError."""
    expected = 'a JSON object such as {"memory": 128000}, in MB; its keys may be ' + ", ".join(KEYS)
    try:
        requested = json.loads(text)
    except ValueError as error:
        raise PodError(f"resources {text!r}: expected {expected}") from error
    if not isinstance(requested, dict) or any(
        key not in KEYS or type(value) is not int or value < 1 for key, value in requested.items()
    ):
        raise PodError(f"resources {text}: expected {expected}")
    return requested


def machine_of(name: str, gpus: int | None = None) -> Machine:
    """The machine of that name, with all or `gpus` of its GPUs; "cpu" has none. Raises PodError."""
    if name == "cpu":
        if gpus:
            raise PodError(
                f'resources {{"gpu": {gpus}}}: the machine cpu has none. Leave it out, or name a machine'
            )
        return Machine("cpu", "cpu", "CPU", CPU_RANKS, 0.0, 0.0, "none", math.inf, math.inf)
    try:
        machine = find_machine(name)
    except MachineError as error:
        raise PodError(f"machine: {error}, and cpu") from error
    if gpus and gpus > machine.count:
        raise PodError(f'resources {{"gpu": {gpus}}}: {machine.name} has {machine.count} GPUs. Request fewer')
    return replace(machine, count=gpus or machine.count)


def plan_for(machine: Machine) -> Plan:
    """The plan of Dolly's run on the machine: of adapters (--lora) where only they fit, else also if it does not fit.

    On "cpu": of the demo with Alpaca's row lengths.
    """
    chosen = preset_options(machine.family, machine.count)
    if machine.is_cpu:
        chosen |= demo_options(machine.count)
    # Times are not used here, so no CPU needs measuring.
    machine = replace(machine, flops=machine.flops or 1e9)
    plan = _plan(chosen, machine)
    if plan.fits or machine.is_cpu:
        return plan
    adapters = (
        _plan(method_options(machine.family, machine.count, name), machine) for name in _methods(machine)
    )
    return next((other for other in adapters if other.fits), plan)


def _methods(machine: Machine) -> tuple[str, ...]:
    """Methods that need less memory than training all weights. Only one GPU trains on a base in 4 bits."""
    return ("lora", "qlora") if machine.count == 1 else ("lora",)


def _plan(chosen: Mapping[str, Any], machine: Machine) -> Plan:
    options = TrainingOptions(local_output_dir="OUTPUT", **chosen)
    settings = resolve(options, machine.count, find_family(machine.family).precision)
    return plan_run(settings, alpaca_lengths(), model_shape(options.input_model), machine)


def resources(name: str, requested: Mapping[str, int]) -> dict[str, Any]:
    """Metaflow's @resources for the train step; `requested` replaces the plan's values.

    {"cpu": 32, "gpu": 8, "memory": MB, "disk": MB, "shared_memory": MiB}; "gpu" is None without GPUs.
    """
    machine = machine_of(name, requested.get("gpu"))
    return {
        "cpu": machine.count * (1 if machine.is_cpu else CPUS_A_GPU),
        "gpu": None if machine.is_cpu else machine.count,
        # With more, the pod would wait forever, because no node has it.
        **_needs(plan_for(machine), at_most=SHARE_OF_NODE * machine.host_gib),
        "shared_memory": round(1024 * SHARED_GIB * machine.count),
        **requested,
    }


def pod_machine(name: str, requested: Mapping[str, int]) -> Machine:
    """The pod as a machine: its GPUs, memory and disk."""
    machine, granted = machine_of(name, requested.get("gpu")), resources(name, requested)
    memory, disk = (granted[key] * 1e6 / GIB for key in ("memory", "disk"))
    return replace(machine, name="this pod", host_gib=memory - _overhead(machine), disk_gib=disk)


def advice(plan: Plan, requested: Mapping[str, int]) -> str:
    """What to type to request the missing memory or disk; "" if GPU memory is short."""
    needs, keys = _needs(plan), {"host memory": "memory", "disk": "disk"}
    if not plan.shortages.keys() <= keys.keys():
        return ""
    more = {**requested, **{keys[kind]: needs[keys[kind]] for kind in plan.shortages}}
    return f"To request it, type --config-value resources '{json.dumps(more)}' before run"


def _needs(plan: Plan, at_most: float = math.inf) -> dict[str, int]:
    """Memory (at most `at_most` GiB) and disk in MB for a pod in which the plan fits."""
    memory = _megabytes(_overhead(plan.machine) + MARGIN * max(plan.host_memory_gib.values()))
    if at_most < math.inf:
        memory = min(memory, 1000 * int(at_most * GIB / 1e9))
    return {"memory": memory, "disk": _megabytes(MARGIN * sum(plan.disk_gib.values()))}


def _overhead(machine: Machine) -> float:
    """GiB of the pod's memory that are not left for training."""
    return DRIVER_GIB + SHARED_GIB * machine.count


def _megabytes(gib: float) -> int:
    """MB for Metaflow (10**6 bytes, Kubernetes' M), rounded up to the next 1000."""
    return 1000 * math.ceil(gib * GIB / 1e9)
