"""This machine: its devices and their free memory, free host memory, free disk, and the peak memory of this process."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.consts import GIB
from training.errors import MachineError
from training.files import free_bytes
from training.machine.catalogue import GPUS, Machine, check_device_count, family_of, gpu_of, peak_of

THIS_MACHINE = "this machine"  # its name in the plan


def this_machine(
    folder: str | Path = ".", num_gpus: int | None = None, taken_gib: Sequence[float] | None = None
) -> Machine:
    """This machine's devices and their free memory, free host memory and free disk (of `folder`). Imports torch.

    Without a GPU the devices are `num_gpus` CPU ranks, by default two as in the demo. If the GPUs differ, the one with
    the least free memory counts, because ZeRO shards evenly. Raises MachineError if `num_gpus` is below 1, or if the
    machine has fewer GPUs.

    `taken_gib` comes from an earlier call of `gpu_memory_taken_gib`.
    """
    import torch

    if num_gpus is not None:
        check_device_count(num_gpus)
    host, disk = free_host_gib(), free_disk_gib(folder)
    if not torch.cuda.is_available():
        return Machine(THIS_MACHINE, "cpu", "CPU", num_gpus or 2, 0.0, 0.0, "none", host, disk)
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if num_gpus and num_gpus > len(devices):
        raise MachineError(f"--num-gpus {num_gpus}: this machine has {len(devices)} GPUs")
    used = devices[:num_gpus]  # the launchers start with the first
    taken = gpu_memory_taken_gib() if taken_gib is None else taken_gib
    free = [device.total_memory / GIB - gib for device, gib in zip(used, taken, strict=False)]
    smallest = min(range(len(used)), key=free.__getitem__)
    name, has_bf16 = used[smallest].name, used[smallest].major >= 8
    family = family_of(name, has_bf16=has_bf16)
    return Machine(
        name=THIS_MACHINE,
        family=family,
        gpu=name,
        count=num_gpus or len(devices),
        gpu_memory_gib=max(0.0, free[smallest]),
        flops=peak_of(name) or GPUS["A10"].flops,
        link=_link(name),
        host_gib=host,
        disk_gib=disk,
        taken_gib=taken[smallest],
    )


def gpu_memory_taken_gib() -> list[float]:
    """GiB of each visible GPU that running processes use; 0 where nvidia-smi does not say, as for a MIG device.

    torch.cuda.mem_get_info would create a CUDA context on every GPU, which takes about 0.5 GiB of each for as long as this
    process lives. A rank calls this function before it creates its own context, which the plan counts separately.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"]  # MiB
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    lines = (line.split(",") for line in listed.splitlines())
    used = {line[0].strip(): line[-1].strip() for line in lines}
    found = [
        used.get(f"GPU-{torch.cuda.get_device_properties(i).uuid}", "")
        for i in range(torch.cuda.device_count())
    ]
    return [int(mib) / 1024 if mib.isdigit() else 0.0 for mib in found]  # "[N/A]" where it is not supported


def _link(device_name: str) -> str:
    """The link between GPUs, guessed from the name: SXM modules are assumed to be connected by NVLink."""
    known = gpu_of(device_name)
    return known.link if known and "PCI" not in device_name else "pcie"


def free_disk_gib(folder: str | Path) -> float:
    """Free space of the disk of `folder`, which need not exist; infinite if the disk does not report it."""
    free = free_bytes(Path(folder))
    return math.inf if free is None else free / GIB


def free_host_gib(cgroups: str | Path = "/sys/fs/cgroup") -> float:
    """Available host memory: the machine's, or less if this container has a limit.

    psutil reports the memory of the whole host even in a container.
    """
    import psutil

    free = psutil.virtual_memory().available
    for limit_file, used_file in (  # cgroup v2, then v1
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int((Path(cgroups) / limit_file).read_text())
            used = int((Path(cgroups) / used_file).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        free = min(free, max(limit - used + _file_cache(Path(cgroups) / limit_file), 0))
        break
    return free / GIB


def _file_cache(limit_file: Path) -> int:
    """Bytes of cached files in a container's usage, which the system frees when memory is needed."""
    try:
        lines = (limit_file.parent / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    figures = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(figures.get("total_inactive_file", figures.get("inactive_file", 0)))


def peak_memory_gib(on_gpu: bool) -> float:
    """Peak memory of this process so far, on its GPU or on the host."""
    if on_gpu:
        import torch

        return torch.cuda.max_memory_allocated() / GIB
    if sys.platform.startswith("linux"):  # getrusage includes the parent's peak before exec
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
