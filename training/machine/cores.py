"""Cores of this machine: how many, and binding ranks to them with DeepSpeed's launcher and numactl."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

CPUS = Path("/sys/devices/system/cpu")


@cache
def binding_words(ranks: int) -> tuple[str, ...]:
    """Options of the `deepspeed` command that give each of `ranks` ranks cores of its own; empty if that would fail.

    An offloaded optimizer computes on the host. Unbound, each rank starts a thread for every core.

    With these options DeepSpeed starts each rank through numactl without a check. So each of its commands is tried
    first: numactl may be missing, and many containers do not let it bind memory.
    """
    numa = _numa_of_deepspeed() if shutil.which("numactl") else None
    cores = _physical_cores()
    if numa is None or not 0 < ranks <= len(cores):
        return ()
    # DeepSpeed's default is cores 0 to n - 1. A container may have others, and they may be two halves of one core.
    in_a_row = cores == list(range(cores[0], cores[-1] + 1))
    chosen = f"{cores[0]}-{cores[-1]}" if in_a_row and len(cores) > 1 else ",".join(map(str, cores))
    try:
        # It prints advice if the package manager knows no numactl.
        with contextlib.redirect_stdout(io.StringIO()):
            commands = [numa.get_numactl_cmd(chosen, ranks, rank)[1] for rank in range(ranks)]
        for command in commands:
            subprocess.run([*command, "true"], capture_output=True, check=True, timeout=60)
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: KMP_AFFINITY is set
        return ()
    return "--bind_cores_to_rank", "--bind_core_list", chosen


def usable_cores() -> int:
    """Number of CPUs that this process may use: in a container or a bound rank not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numa_of_deepspeed() -> ModuleType | None:
    """DeepSpeed's utils/numa.py alone, because the package would import torch."""
    package = importlib.util.find_spec("deepspeed")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "utils" / "numa.py"
    spec = importlib.util.spec_from_file_location("deepspeed_numa", file)
    if spec is None or spec.loader is None or not file.exists():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _physical_cores() -> list[int]:
    """One number of each physical core that this process may use, sorted; empty if the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    firsts: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        with contextlib.suppress(OSError):
            firsts.setdefault(siblings.read_text(), cpu)
    return sorted(firsts.values())
