"""DeepSpeed's C++ operators, compiled by one rank after the other, and never waited for in vain."""

from __future__ import annotations

from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory


def compile_operators(offload: bool) -> None:
    """Compiles, or loads, what DeepSpeed would compile later: its CPU collectives, and its CPU Adam if offloaded.

    torch marks a compilation by a file, and waits for it to go without an end: a rank that is killed while it
    compiles leaves the file, and every later run hangs. The system takes our own lock from a dead process, so
    whoever holds it knows that a mark still there is a dead rank's.
    """
    from deepspeed.accelerator import get_accelerator

    names = [] if torch.cuda.is_available() else ["ShareMemCommBuilder"]
    if offload:
        names.append("CPUAdamBuilder")
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible(verbose=False):
            continue  # DeepSpeed does without, or says why it cannot
        folder = Path(_get_build_directory(builder.name, verbose=False))
        with FileLock(folder / "one-rank-at-a-time.lock"):
            (folder / "lock").unlink(missing_ok=True)
            builder.load()
