"""Catalogue of GPUs and cloud machines: memory, disk, links and peak speed from data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from training.consts import GIB
from training.errors import MachineError

# Dense tensor-core peaks of one device, in FLOP/s, from NVIDIA's data sheets. Keys are parts of
# torch.cuda.get_device_name(). bf16 and fp16 have the same peak; V100 has no bf16.
PEAK_FLOPS = {
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,  # SXM
    "A100": 312e12,
    "A10G": 70e12,  # AWS' variant of the A10
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,  # SXM2; 112e12 as PCIe
    "T4": 65e12,
}

# Bytes/s per GPU in a collective of all GPUs of a machine ("bus bandwidth" of nccl-tests): two thirds of NVLink's
# nominal 450, 300 and 150 GB/s one way. Cloud GPUs on PCIe have no peer access, so every byte goes through host
# memory: 6 GB/s is an assumption.
LINKS = {"nvlink4": 300e9, "nvlink3": 200e9, "nvlink2": 90e9, "pcie": 6e9, "none": 1e9}


@dataclass(frozen=True)
class Family:
    """GPUs that share a training recipe. A new family is one entry of FAMILIES.

    Attributes:
        devices: words that torch.cuda.get_device_name() contains for these GPUs.
        precision: the best one of these GPUs; the DeepSpeed JSON may override it.
        deepspeed: path of the DeepSpeed configuration in the repository.
        offload: the configuration with the optimizer in host memory; None if it has no benefit.
        link: key of LINKS, for GPUs that are connected to each other (SXM).
        share_of_peak: share of `Machine.flops` that forward and backward of packed rows reach on the device. From other
            software: 50.9% (8xA100-40GB, 7B, 512 tokens) and 46.4% (8xH100) in llm-foundry's table of benchmarks, 40 of
            125 TFLOP/s on a V100 in the paper of ZeRO-Offload (Ren et al. 2021). A10 is assumed to be like A100.
    """

    devices: tuple[str, ...]
    precision: str
    deepspeed: str
    offload: str | None
    link: str
    share_of_peak: float


_BF16, _BF16_OFFLOAD = "config/ds_z3_bf16_config.json", "config/ds_z3_bf16_offload_config.json"
_FP32 = "config/ds_z3_fp32_config.json"
_FP16, _FP16_OFFLOAD = "config/ds_z3_fp16_config.json", "config/ds_z3_fp16_offload_config.json"
FAMILIES = {
    "a100": Family(("A100",), "bf16", _BF16, _BF16_OFFLOAD, "nvlink3", 0.5),
    "h100": Family(("H100", "H200"), "bf16", _BF16, _BF16_OFFLOAD, "nvlink4", 0.45),
    "a10": Family(("A10",), "bf16", _BF16_OFFLOAD, _BF16_OFFLOAD, "pcie", 0.5),
    "v100": Family(("V100",), "fp16", _FP16, _FP16_OFFLOAD, "nvlink2", 0.32),
    # CPU ranks, for the demo and the tests. They use host memory, and their peak speed is measured. The demo reaches
    # 0.2 to 0.6 of it, on one and two ranks (tests/plan/test_plan_cpu_time.py). Most CPUs have no instructions for bf16,
    # and compute it many times slower.
    "cpu": Family((), "fp32", _FP32, None, "none", 0.35),
}


def find_family(name: str) -> Family:
    """The family of that name. Raises MachineError with the known names."""
    if name not in FAMILIES:
        raise MachineError(f"unknown GPU family {name!r}. Known are: {', '.join(FAMILIES)}")
    return FAMILIES[name]


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        family: key of FAMILIES.
        memory_gib: total memory that CUDA reports, in GiB; less than the label says.
        peak: key of PEAK_FLOPS.
    """

    family: str
    memory_gib: float
    peak: str


GPUS = {
    "H100": Gpu("h100", 79.1, "H100"),
    "A100-80GB": Gpu("a100", 79.1, "A100"),
    "A100-40GB": Gpu("a100", 39.4, "A100"),
    "A10G": Gpu("a10", 22.0, "A10G"),
    "A10": Gpu("a10", 22.0, "A10"),
    "V100-32GB": Gpu("v100", 31.7, "V100"),
}


@dataclass(frozen=True)
class Machine:
    """A machine to train on: one of MACHINES, or this one.

    Attributes:
        gpu: key of GPUS, a device's own name, or "CPU".
        count: number of GPUs; on a CPU machine number of ranks.
        gpu_memory_gib: usable memory of one GPU; 0 on a CPU machine, whose ranks use host memory.
        taken_gib: memory of that GPU that other processes use; `gpu_memory_gib` is without it.
        flops: peak FLOP/s of one device in 16 bit; 0 on a CPU machine until it is measured.
        link: key of LINKS.
        host_gib, disk_gib: total host memory and disk; for this machine, the free part.
    """

    name: str
    family: str
    gpu: str
    count: int
    gpu_memory_gib: float
    flops: float
    link: str
    host_gib: float
    disk_gib: float
    taken_gib: float = 0.0

    @property
    def is_cpu(self) -> bool:
        return self.family == "cpu"


def _machine(name: str, count: int, gpu: str, link: str, host_gib: float, disk_gib: float) -> Machine:
    model = GPUS[gpu]
    return Machine(
        name, model.family, gpu, count, model.memory_gib, PEAK_FLOPS[model.peak], link, host_gib, disk_gib
    )


_GB = 1e9 / GIB  # AWS and Google give local disks in GB, Azure in GiB

# (name, GPUs, GPU, link, host memory in GiB, local disk in GiB)
MACHINES = {
    machine.name: machine
    for machine in (
        # Short names of the most common machine: Azure's for A100 and 2xA10, AWS's for the others. For 3xA100-80GB
        # only the GPUs are published; its host is 3/8 of Azure's machine with eight.
        _machine("8xA100-40GB", 8, "A100-40GB", "nvlink3", 900, 6000),
        _machine("8xA100-80GB", 8, "A100-80GB", "nvlink3", 1900, 6400),
        _machine("3xA100-80GB", 3, "A100-80GB", "nvlink3", 712, 2400),
        _machine("8xH100", 8, "H100", "nvlink4", 2048, 30720 * _GB),
        _machine("4xA10", 4, "A10G", "pcie", 384, 3800 * _GB),
        _machine("2xA10", 2, "A10", "pcie", 880, 1400),
        _machine("8xV100-32GB", 8, "V100-32GB", "nvlink2", 768, 1800 * _GB),
        # AWS, "Amazon EC2 instance types: accelerated computing"
        _machine("p3dn.24xlarge", 8, "V100-32GB", "nvlink2", 768, 1800 * _GB),
        _machine("p4d.24xlarge", 8, "A100-40GB", "nvlink3", 1152, 8000 * _GB),
        _machine("p4de.24xlarge", 8, "A100-80GB", "nvlink3", 1152, 8000 * _GB),
        _machine("p5.48xlarge", 8, "H100", "nvlink4", 2048, 30720 * _GB),
        _machine("g5.xlarge", 1, "A10G", "pcie", 16, 250 * _GB),
        _machine("g5.2xlarge", 1, "A10G", "pcie", 32, 450 * _GB),
        _machine("g5.4xlarge", 1, "A10G", "pcie", 64, 600 * _GB),
        _machine("g5.8xlarge", 1, "A10G", "pcie", 128, 900 * _GB),
        _machine("g5.16xlarge", 1, "A10G", "pcie", 256, 1900 * _GB),
        _machine("g5.12xlarge", 4, "A10G", "pcie", 192, 3800 * _GB),
        _machine("g5.24xlarge", 4, "A10G", "pcie", 384, 3800 * _GB),
        _machine("g5.48xlarge", 8, "A10G", "pcie", 768, 7600 * _GB),
        # Azure, "GPU accelerated virtual machine sizes"; the disk is the temporary disk
        _machine("Standard_ND96asr_v4", 8, "A100-40GB", "nvlink3", 900, 6000),
        _machine("Standard_ND96amsr_A100_v4", 8, "A100-80GB", "nvlink3", 1900, 6400),
        _machine("Standard_NV36ads_A10_v5", 1, "A10", "pcie", 440, 720),
        _machine("Standard_NV72ads_A10_v5", 2, "A10", "pcie", 880, 1400),
        _machine("Standard_ND40rs_v2", 8, "V100-32GB", "nvlink2", 672, 2948),
        # Google, "Accelerator-optimized machine family". The number of local disks of a2-highgpu can be chosen; this is
        # the maximum. The other machines have a fixed number.
        _machine("a2-highgpu-1g", 1, "A100-40GB", "nvlink3", 85, 3000 * _GB),
        _machine("a2-highgpu-2g", 2, "A100-40GB", "nvlink3", 170, 3000 * _GB),
        _machine("a2-highgpu-4g", 4, "A100-40GB", "nvlink3", 340, 3000 * _GB),
        _machine("a2-highgpu-8g", 8, "A100-40GB", "nvlink3", 680, 3000 * _GB),
        _machine("a2-ultragpu-1g", 1, "A100-80GB", "nvlink3", 170, 375 * _GB),
        _machine("a2-ultragpu-2g", 2, "A100-80GB", "nvlink3", 340, 750 * _GB),
        _machine("a2-ultragpu-4g", 4, "A100-80GB", "nvlink3", 680, 1500 * _GB),
        _machine("a2-ultragpu-8g", 8, "A100-80GB", "nvlink3", 1360, 3000 * _GB),
        _machine("a3-highgpu-8g", 8, "H100", "nvlink4", 1872, 6000 * _GB),
    )
}


def find_machine(name: str) -> Machine:
    """The machine of that name, case-insensitive. Raises MachineError with the nearest names."""
    by_lower = {known.lower(): machine for known, machine in MACHINES.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.3)
    nearest = f"Nearest: {', '.join(by_lower[key].name for key in matches)}. " if matches else ""
    raise MachineError(f"unknown machine {name!r}. {nearest}Known are: {', '.join(MACHINES)}")


def family_of(device_name: str, has_bf16: bool) -> str:
    """The GPU family (key of FAMILIES) of a torch.cuda.get_device_name().

    An unknown GPU gets a family whose plan it can follow: a10, which needs the least memory, or v100 if it lacks bf16.
    """
    for name, family in FAMILIES.items():
        if matches_family(family, device_name) and (has_bf16 or family.precision != "bf16"):
            return name
    return "a10" if has_bf16 else "v100"


def peak_of(device_name: str) -> float | None:
    """The data sheet's peak of a device, in FLOP/s; None for an unknown device."""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in device_name), None)


def matches_family(family: Family, device_name: str) -> bool:
    """Whether a device belongs to the family. "NVIDIA A100" is not an "A10"."""
    return any(re.search(rf"\b{device}(?![0-9])", device_name) for device in family.devices)
