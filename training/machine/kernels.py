"""Checks whether this build of torch can use the GPUs of this machine, and in which precision."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from training.machine.catalogue import find_family
from training.ranks import world_size


def kernel_problems() -> list[str]:
    """GPUs that this build of torch cannot use. Without this check torch may silently train on the CPU."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # Slurm sets the last
    if torch.version.hip or hidden:
        return []
    release, cuda = torch.__version__.split("+")[0], torch.version.cuda
    older = f"python -m pip install torch=={release}+cu126 --index-url https://download.pytorch.org/whl/cu126"
    newest = f"python -m pip uninstall -y torch && python -m pip install torch=={release}"
    if not torch.cuda.is_available():
        if not _nvidia_gpu():
            return []
        on_cpu = "or export CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
        if cuda is None:
            return [
                f"This machine has an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA. "
                f"Type {newest} (for a V100 {older}), {on_cpu}"
            ]
        return [
            f"This machine has an NVIDIA GPU, but CUDA does not start: {_why_no_cuda()}. Update the driver to one for "
            f"CUDA {cuda}, type {older}, {on_cpu}"
        ]
    arch_list = torch.cuda.get_arch_list()
    if not arch_list:
        return []
    gpus = Counter(
        (torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu))
        for gpu in range(torch.cuda.device_count())
    )
    problems = []
    for (name, capability), count in gpus.items():
        if not missing_kernels(capability, arch_list):
            continue
        if capability > max(_built_capability(arch) for arch in arch_list):
            fix = f"Type {newest}, or use another GPU"
        elif cuda and cuda.startswith("12.6"):  # the build that supports the oldest GPUs
            fix = "Use a newer GPU"
        else:
            fix = f"Type {older}"
        problems.append(
            f"{count} x {name} (sm_{capability[0]}{capability[1]}): torch {torch.__version__} has no kernels for it, "
            f"only {' '.join(arch_list)}. {fix}"
        )
    return problems


def missing_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a torch build has no code that runs on a GPU.

    A binary (sm_86) runs on GPUs of its major version whose minor version is not lower; intermediate code (compute_80)
    runs on all newer GPUs. The suffix "a" restricts it to that architecture, "f" to its family.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility and #ptx-compatibility

    Args:
        capability: (major, minor) from torch.cuda.get_device_capability.
        arch_list: from torch.cuda.get_arch_list.
    """
    for arch in arch_list:
        built = _built_capability(arch)
        if arch.endswith("a"):
            runs = capability == built
        elif arch.startswith("compute_") and not arch.endswith("f"):
            runs = capability >= built
        else:
            runs = capability[0] == built[0] and capability[1] >= built[1]
        if runs:
            return False
    return True


def _built_capability(arch: str) -> tuple[int, int]:
    """ "sm_75" -> (7, 5), "compute_120" -> (12, 0); (0, 0) for any other name."""
    match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[af]?", arch)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _nvidia_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether the system has an NVIDIA GPU. Images without a GPU may contain nvidia-smi, so it is executed."""
    if any(devices.glob("nvidia[0-9]*")):
        return True
    command = shutil.which("nvidia-smi")
    if not command:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "torch sees no device"


def best_precision() -> str:
    """Best precision of the devices of this machine: "bf16", "fp16", or "fp32" on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def precision_problems(precision: str) -> list[str]:
    """Reports a precision that the devices of this machine do not support, with what to type instead."""
    import torch

    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        return [
            "fp16 needs a CUDA GPU, and this machine has none. "
            f"Type --deepspeed {find_family('cpu').deepspeed}, or leave out --fp16"
        ]
    if precision == "bf16" and cuda and best_precision() != "bf16":
        return [
            f"{torch.cuda.get_device_name()} cannot compute in bf16. "
            "Use --deepspeed config/ds_z3_fp16_config.json, or --fp16"
        ]
    return []


def device_problems() -> list[str]:
    """Reports several visible GPUs in a run of one rank, which would use only one."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1 and world_size() == 1:
        return [
            f"{gpus} GPUs are visible, but one rank was started. "
            f"Type deepspeed --num_gpus {gpus} --module training.trainer ..., or export CUDA_VISIBLE_DEVICES=0"
        ]
    return []
