"""Resources of the pod that trains on a machine: CPUs, GPUs, memory, disk and shared memory, from the plan.

Metaflow must know them before a run has parameters, so they are counted for Dolly's run (on "cpu" for the demo's). A run
that needs more is refused in its first step, with the number to type. Imports no torch.
"""

from __future__ import annotations

import json
import math
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
from training.plan.presets import demo_options, preset_options

CPU_RANKS = 2
# A container has 64 MiB of /dev/shm, and NCCL keeps its buffers between the GPUs of a node there: 2 GiB a rank make
# the 16 GiB of eight that training.launch.exits names as well. What is used of it counts as the pod's memory.
SHARED_GIB = 2.0
# For each rank, with its supervisor and the threads of the offloaded Adam. Clouds give no fewer with a GPU, and a pod
# that requests more than a node has waits for ever.
CPUS_A_GPU = 4
DRIVER_GIB = 2.0  # the flow's own process and card, DeepSpeed's launcher, Metaflow's sidecars
MARGIN = 1.1  # the plan's own accuracy
SHARE_OF_NODE = 0.95  # of a machine's memory, what a node has left for pods. An assumption
KEYS = ("cpu", "gpu", "memory", "disk", "shared_memory")  # of Metaflow's @resources


class PodError(MetaflowException):
    """A pod that no machine can be; Metaflow shows the message without a traceback."""

    headline = "No such pod"


def parse_machine(name: str) -> str:
    """The config "machine", checked. Raises PodError with the known names."""
    return machine_of(name.strip()).name


def parse_resources(text: str) -> dict[str, int]:
    """The config "resources", checked: a JSON object of positive whole numbers. Raises PodError."""
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
    """The machine of that name, or `gpus` of its GPUs; "cpu" is any without one. Raises PodError."""
    if name == "cpu":
        return Machine("cpu", "cpu", "CPU", CPU_RANKS, 0.0, 0.0, "none", math.inf, math.inf)
    try:
        machine = find_machine(name)
    except MachineError as error:
        raise PodError(f"machine: {error}, cpu") from error
    if gpus and gpus > machine.count:
        raise PodError(f'resources {{"gpu": {gpus}}}: {machine.name} has {machine.count}')
    return replace(machine, count=gpus or machine.count)


def plan_for(machine: Machine) -> Plan:
    """The plan of Dolly's run there, whether it fits or not; on "cpu" of the demo's, with rows as long as Alpaca's."""
    chosen = preset_options(machine.family, machine.count)
    if machine.is_cpu:
        chosen |= demo_options(machine.count)
    options = TrainingOptions(local_output_dir="OUTPUT", **chosen)
    settings = resolve(options, machine.count, find_family(machine.family).precision)
    machine = replace(machine, flops=machine.flops or 1e9)  # nobody reads times here, so no CPU is measured
    return plan_run(settings, alpaca_lengths(), model_shape(options.input_model), machine)


def resources(name: str, requested: Mapping[str, int]) -> dict[str, Any]:
    """Metaflow's @resources for the step that trains on a machine; `requested` stands in place of what the plan says.

    {"cpu": 32, "gpu": 8, "memory": MB, "disk": MB, "shared_memory": MiB}; "gpu" is None without one.
    """
    machine = machine_of(name, requested.get("gpu"))
    return {
        "cpu": machine.count * (1 if machine.is_cpu else CPUS_A_GPU),
        "gpu": None if machine.is_cpu else machine.count,
        # No node could give more, and the pod would wait for ever.
        **_needs(plan_for(machine), at_most=SHARE_OF_NODE * machine.host_gib),
        "shared_memory": round(1024 * SHARED_GIB * machine.count),
        **requested,
    }


def pod_machine(name: str, requested: Mapping[str, int]) -> Machine:
    """The machine that training finds in such a pod: its GPUs, with the pod's memory and disk."""
    machine, granted = machine_of(name, requested.get("gpu")), resources(name, requested)
    memory, disk = (granted[key] * 1e6 / GIB for key in ("memory", "disk"))
    return replace(machine, name="this pod", host_gib=memory - _overhead(machine), disk_gib=disk)


def advice(plan: Plan, requested: Mapping[str, int]) -> str:
    """What to type so that a pod gets what this run's plan lacks; "" where no pod of the machine has it."""
    needs, keys = _needs(plan), {"host memory": "memory", "disk": "disk"}
    if not plan.shortages.keys() <= keys.keys():  # GPU memory
        return ""
    more = {**requested, **{keys[kind]: needs[keys[kind]] for kind in plan.shortages}}
    return f"To ask for it, type --config-value resources '{json.dumps(more)}' before run"


def _needs(plan: Plan, at_most: float = math.inf) -> dict[str, int]:
    """MB of memory (of no more GiB than `at_most`) and of disk for a pod in which the plan fits."""
    memory = min(at_most, _overhead(plan.machine) + MARGIN * max(plan.host_memory_gib.values()))
    return {"memory": _megabytes(memory), "disk": _megabytes(MARGIN * sum(plan.disk_gib.values()))}


def _overhead(machine: Machine) -> float:
    """GiB of a pod's memory that training does not get."""
    return DRIVER_GIB + SHARED_GIB * machine.count


def _megabytes(gib: float) -> int:
    """Metaflow's unit for memory and disk, 10**6 bytes (Kubernetes' M), rounded up to the next 1000."""
    return 1000 * math.ceil(gib * GIB / 1e9)
