"""Catalogue of GPUs and cloud machines: memory, disk, links and peak speed from data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from training.consts import GIB
from training.errors import MachineError

# Bytes/s per GPU in a collective of all GPUs of a machine ("bus bandwidth" of nccl-tests): two thirds of NVLink's
# nominal 900, 450, 300 and 150 GB/s one way. Cloud GPUs on PCIe have no peer access, so every byte goes through host
# memory: 6 GB/s is an assumption.
LINKS = {"nvlink5": 600e9, "nvlink4": 300e9, "nvlink3": 200e9, "nvlink2": 90e9, "pcie": 6e9, "none": 1e9}


@dataclass(frozen=True)
class Family:
    """GPUs that share a training recipe. A new family is one entry of FAMILIES, which an entry of GPUS names.

    Attributes:
        precision: the best one of these GPUs; the DeepSpeed JSON may override it.
        deepspeed: path of the DeepSpeed configuration in the repository.
        offload: the configuration with the optimizer in host memory; None if it has no benefit.
        share_of_peak: share of `Machine.flops` that forward and backward of packed rows reach on the device. From other
            software: 50.9% (8xA100-40GB, 7B, 512 tokens) and 46.4% (8xH100) in llm-foundry's table of benchmarks, 40 of
            125 TFLOP/s on a V100 in the paper of ZeRO-Offload (Ren et al. 2021). A10 is assumed to be like A100, and T4
            like V100.
    """

    precision: str
    deepspeed: str
    offload: str | None
    share_of_peak: float


_BF16, _BF16_OFFLOAD = "config/ds_z3_bf16_config.json", "config/ds_z3_bf16_offload_config.json"
_FP32 = "config/ds_z3_fp32_config.json"
_FP16, _FP16_OFFLOAD = "config/ds_z3_fp16_config.json", "config/ds_z3_fp16_offload_config.json"
FAMILIES = {
    "a100": Family("bf16", _BF16, _BF16_OFFLOAD, 0.5),
    "h100": Family("bf16", _BF16, _BF16_OFFLOAD, 0.45),
    # GPUs on PCIe with 22 to 48 GiB
    "a10": Family("bf16", _BF16_OFFLOAD, _BF16_OFFLOAD, 0.5),
    "v100": Family("fp16", _FP16, _FP16_OFFLOAD, 0.32),
    "t4": Family("fp16", _FP16_OFFLOAD, _FP16_OFFLOAD, 0.32),
    # CPU ranks, for the demo and the tests. They use host memory, and their peak speed is measured. The demo reaches
    # 0.2 to 0.6 of it, on one and two ranks (tests/plan/test_plan_cpu_time.py). Most CPUs have no instructions for bf16,
    # and compute it many times slower.
    "cpu": Family("fp32", _FP32, None, 0.35),
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
        flops: dense peak of the tensor cores in 16 bit with sums in float32, in FLOP/s. bf16 and fp16 have the same.
        link: key of LINKS: how several of them are connected. NVLink bridges between two PCIe cards are not counted.
        device: words that torch.cuda.get_device_name() contains. The longest words that fit decide.
    """

    family: str
    memory_gib: float
    flops: float
    link: str
    device: str


# Peaks: NVIDIA's data sheets, which mostly print twice the dense value, for sparse matrices; for RTX 3090, RTX 4090 and
# A6000 the whitepapers of GA102 and of Ada. A10G is AWS' variant of the A10. A V100 on PCIe has 112e12.
# Memory: the total capacity that PyTorch names in its out-of-memory errors, as people have posted them; for L40,
# H100-PCIe and H200-NVL that of the same chip beside it.
GPUS = {
    "T4": Gpu("t4", 14.6, 65e12, "pcie", "T4"),
    "V100-32GB": Gpu("v100", 31.7, 125e12, "nvlink2", "V100"),
    "L4": Gpu("a10", 22.0, 121e12, "pcie", "L4"),
    "A10": Gpu("a10", 22.0, 125e12, "pcie", "A10"),
    "A10G": Gpu("a10", 22.0, 70e12, "pcie", "A10G"),
    "RTX-3090": Gpu("a10", 23.6, 71e12, "pcie", "RTX 3090"),
    "RTX-4090": Gpu("a10", 23.6, 165.2e12, "pcie", "RTX 4090"),
    "A6000": Gpu("a10", 47.5, 154.8e12, "pcie", "RTX A6000"),
    "L40": Gpu("a10", 44.4, 181e12, "pcie", "L40"),
    "L40S": Gpu("a10", 44.4, 362e12, "pcie", "L40S"),
    "A100-40GB": Gpu("a100", 39.4, 312e12, "nvlink3", "A100"),
    "A100-80GB": Gpu("a100", 79.1, 312e12, "nvlink3", "A100"),
    "A100-80GB-PCIe": Gpu("a100", 79.1, 312e12, "pcie", "A100 80GB PCIe"),
    "H100": Gpu("h100", 79.1, 989.5e12, "nvlink4", "H100"),  # SXM
    "H100-PCIe": Gpu("h100", 79.1, 756e12, "pcie", "H100 PCIe"),
    "H100-NVL": Gpu("h100", 93.1, 835.5e12, "pcie", "H100 NVL"),
    "H200": Gpu("h100", 139.8, 989.5e12, "nvlink4", "H200"),  # SXM
    "H200-NVL": Gpu("h100", 139.8, 835.5e12, "pcie", "H200 NVL"),
    "B200": Gpu("h100", 178.3, 2250e12, "nvlink5", "B200"),
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
        host_gib: host memory that programs can use; for this machine, the free part.
        disk_gib: total disk; for this machine, the free part.
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


def _machine(name: str, count: int, gpu: str, host_gib: float, disk_gib: float) -> Machine:
    """A machine with `host_gib` on its label."""
    model, host = GPUS[gpu], usable_host_gib(host_gib)
    return Machine(name, model.family, gpu, count, model.memory_gib, model.flops, model.link, host, disk_gib)


def usable_host_gib(label: float) -> float:
    """Host memory that is left for programs: firmware and kernel keep 4% of the label, services 1 GiB. An assumption."""
    return 0.96 * label - 1.0


_GB = 1e9 / GIB  # AWS and Google give local disks in GB, Azure in GiB

# (name, GPUs, GPU, host memory in GiB, local disk in GiB)
MACHINES = {
    machine.name: machine
    for machine in (
        # Short names of the most common machine: Azure's for A100 and 2xA10, AWS's for the others. For 3xA100-80GB
        # only the GPUs are published; its host is 3/8 of Azure's machine with eight.
        _machine("8xA100-40GB", 8, "A100-40GB", 900, 6000),
        _machine("8xA100-80GB", 8, "A100-80GB", 1900, 6400),
        _machine("3xA100-80GB", 3, "A100-80GB", 712, 2400),
        _machine("8xH100", 8, "H100", 2048, 30720 * _GB),
        _machine("8xH200", 8, "H200", 2048, 30720 * _GB),
        _machine("8xB200", 8, "B200", 2048, 30720 * _GB),
        _machine("4xA10", 4, "A10G", 384, 3800 * _GB),
        _machine("2xA10", 2, "A10", 880, 1400),
        _machine("8xV100-32GB", 8, "V100-32GB", 768, 1800 * _GB),
        # AWS, "Amazon EC2 instance types: accelerated computing"
        _machine("p3dn.24xlarge", 8, "V100-32GB", 768, 1800 * _GB),
        _machine("p4d.24xlarge", 8, "A100-40GB", 1152, 8000 * _GB),
        _machine("p4de.24xlarge", 8, "A100-80GB", 1152, 8000 * _GB),
        _machine("p5.4xlarge", 1, "H100", 256, 3840 * _GB),
        _machine("p5.48xlarge", 8, "H100", 2048, 30720 * _GB),
        _machine("p5e.48xlarge", 8, "H200", 2048, 30720 * _GB),
        _machine("p5en.48xlarge", 8, "H200", 2048, 30720 * _GB),
        _machine("p6-b200.48xlarge", 8, "B200", 2048, 30720 * _GB),
        _machine("g5.xlarge", 1, "A10G", 16, 250 * _GB),
        _machine("g5.2xlarge", 1, "A10G", 32, 450 * _GB),
        _machine("g5.4xlarge", 1, "A10G", 64, 600 * _GB),
        _machine("g5.8xlarge", 1, "A10G", 128, 900 * _GB),
        _machine("g5.16xlarge", 1, "A10G", 256, 1900 * _GB),
        _machine("g5.12xlarge", 4, "A10G", 192, 3800 * _GB),
        _machine("g5.24xlarge", 4, "A10G", 384, 3800 * _GB),
        _machine("g5.48xlarge", 8, "A10G", 768, 7600 * _GB),
        _machine("g4dn.xlarge", 1, "T4", 16, 125 * _GB),
        _machine("g4dn.2xlarge", 1, "T4", 32, 225 * _GB),
        _machine("g4dn.4xlarge", 1, "T4", 64, 225 * _GB),
        _machine("g4dn.8xlarge", 1, "T4", 128, 900 * _GB),
        _machine("g4dn.16xlarge", 1, "T4", 256, 900 * _GB),
        _machine("g4dn.12xlarge", 4, "T4", 192, 900 * _GB),
        _machine("g4dn.metal", 8, "T4", 384, 1800 * _GB),
        _machine("g6.xlarge", 1, "L4", 16, 250 * _GB),
        _machine("g6.2xlarge", 1, "L4", 32, 450 * _GB),
        _machine("g6.4xlarge", 1, "L4", 64, 600 * _GB),
        _machine("g6.8xlarge", 1, "L4", 128, 900 * _GB),
        _machine("g6.16xlarge", 1, "L4", 256, 1880 * _GB),
        _machine("g6.12xlarge", 4, "L4", 192, 3760 * _GB),
        _machine("g6.24xlarge", 4, "L4", 384, 3760 * _GB),
        _machine("g6.48xlarge", 8, "L4", 768, 7520 * _GB),
        _machine("g6e.xlarge", 1, "L40S", 32, 250 * _GB),
        _machine("g6e.2xlarge", 1, "L40S", 64, 450 * _GB),
        _machine("g6e.4xlarge", 1, "L40S", 128, 600 * _GB),
        _machine("g6e.8xlarge", 1, "L40S", 256, 900 * _GB),
        _machine("g6e.16xlarge", 1, "L40S", 512, 1900 * _GB),
        _machine("g6e.12xlarge", 4, "L40S", 384, 3800 * _GB),
        _machine("g6e.24xlarge", 4, "L40S", 768, 3800 * _GB),
        _machine("g6e.48xlarge", 8, "L40S", 1536, 7600 * _GB),
        # Azure, "GPU accelerated virtual machine sizes"; the disk is the temporary disk, or local NVMe if it has some
        _machine("Standard_ND96asr_v4", 8, "A100-40GB", 900, 6000),
        _machine("Standard_ND96amsr_A100_v4", 8, "A100-80GB", 1900, 6400),
        _machine("Standard_ND96isr_H100_v5", 8, "H100", 1900, 28000),
        _machine("Standard_ND96isr_H200_v5", 8, "H200", 1850, 28000),
        _machine("Standard_NC24ads_A100_v4", 1, "A100-80GB-PCIe", 220, 960),
        _machine("Standard_NC48ads_A100_v4", 2, "A100-80GB-PCIe", 440, 1920),
        _machine("Standard_NC96ads_A100_v4", 4, "A100-80GB-PCIe", 880, 3840),
        _machine("Standard_NC40ads_H100_v5", 1, "H100-NVL", 320, 3576),
        _machine("Standard_NC80adis_H100_v5", 2, "H100-NVL", 640, 7152),
        _machine("Standard_NC4as_T4_v3", 1, "T4", 28, 176),
        _machine("Standard_NC8as_T4_v3", 1, "T4", 56, 352),
        _machine("Standard_NC16as_T4_v3", 1, "T4", 110, 352),
        _machine("Standard_NC64as_T4_v3", 4, "T4", 440, 2816),
        _machine("Standard_NV36ads_A10_v5", 1, "A10", 440, 720),
        _machine("Standard_NV72ads_A10_v5", 2, "A10", 880, 1400),
        _machine("Standard_ND40rs_v2", 8, "V100-32GB", 672, 2948),
        # Google, "Accelerator-optimized machine family". The number of local disks of a2-highgpu can be chosen; this is
        # the maximum. The other machines have a fixed number.
        _machine("g2-standard-4", 1, "L4", 16, 375 * _GB),
        _machine("g2-standard-8", 1, "L4", 32, 375 * _GB),
        _machine("g2-standard-12", 1, "L4", 48, 375 * _GB),
        _machine("g2-standard-16", 1, "L4", 64, 375 * _GB),
        _machine("g2-standard-32", 1, "L4", 128, 375 * _GB),
        _machine("g2-standard-24", 2, "L4", 96, 750 * _GB),
        _machine("g2-standard-48", 4, "L4", 192, 1500 * _GB),
        _machine("g2-standard-96", 8, "L4", 384, 3000 * _GB),
        _machine("a2-highgpu-1g", 1, "A100-40GB", 85, 3000 * _GB),
        _machine("a2-highgpu-2g", 2, "A100-40GB", 170, 3000 * _GB),
        _machine("a2-highgpu-4g", 4, "A100-40GB", 340, 3000 * _GB),
        _machine("a2-highgpu-8g", 8, "A100-40GB", 680, 3000 * _GB),
        _machine("a2-ultragpu-1g", 1, "A100-80GB", 170, 375 * _GB),
        _machine("a2-ultragpu-2g", 2, "A100-80GB", 340, 750 * _GB),
        _machine("a2-ultragpu-4g", 4, "A100-80GB", 680, 1500 * _GB),
        _machine("a2-ultragpu-8g", 8, "A100-80GB", 1360, 3000 * _GB),
        _machine("a3-highgpu-1g", 1, "H100", 234, 750 * _GB),
        _machine("a3-highgpu-2g", 2, "H100", 468, 1500 * _GB),
        _machine("a3-highgpu-4g", 4, "H100", 936, 3000 * _GB),
        _machine("a3-highgpu-8g", 8, "H100", 1872, 6000 * _GB),
        _machine("a3-megagpu-8g", 8, "H100", 1872, 6000 * _GB),
        _machine("a3-ultragpu-8g", 8, "H200", 2952, 12000 * _GB),
        _machine("a4-highgpu-8g", 8, "B200", 3968, 12000 * _GB),
    )
}


# A machine of which only the GPUs are known: assumptions for a workstation.
OWN_HOST_GIB, OWN_DISK_GIB = 64.0, 1000 * _GB  # for each GPU; in all


def find_machine(name: str) -> Machine:
    """The machine of that name, case-insensitive: a key of MACHINES, or COUNTxGPU with a key of GPUS, such as 2xRTX-4090.

    Raises MachineError with the nearest names.
    """
    by_name = {_plain(known): machine for known, machine in MACHINES.items()}
    if machine := by_name.get(_plain(name)):
        return machine
    gpus = {_plain(known): known for known in GPUS}
    count = re.fullmatch(r"([1-9][0-9]?)x(.+)", _plain(name))
    if count and count[2] in gpus:
        gpu = gpus[count[2]]
        return _machine(f"{count[1]}x{gpu}", int(count[1]), gpu, OWN_HOST_GIB * int(count[1]), OWN_DISK_GIB)
    known = list(MACHINES) + [f"{count[1] if count else 1}x{gpu}" for gpu in GPUS]
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.3)
    nearest = f"Nearest: {', '.join(by_lower[key] for key in matches)}. " if matches else ""
    raise MachineError(
        f"unknown machine {name!r}. {nearest}Known are COUNTxGPU, where GPU is {', '.join(GPUS)}, and the machines of the "
        "clouds, which python -m training.plan --help lists. For a machine of your own type --gpu-memory and --gpu-flops instead"
    )


def check_device_count(count: int) -> None:
    """Raises MachineError for a run without devices."""
    if count < 1:
        raise MachineError(f"--num-gpus {count}: at least one device is needed to train")


def _plain(name: str) -> str:
    """A name without differences that do not matter: "2x RTX 4090" and "2xrtx-4090" are the same."""
    return re.sub(r"[\s_-]", "", name.lower())


def described_machine(count: int, memory_gib: float, flops: float, host_gib: float | None = None) -> Machine:
    """One's own machine: `count` GPUs of `memory_gib` GiB each with a peak of `flops` FLOP/s in bf16, on PCIe."""
    host = usable_host_gib(OWN_HOST_GIB * count if host_gib is None else host_gib)
    return Machine(
        "your machine",
        "a10",
        f"GPU of {memory_gib:g} GiB",
        count,
        memory_gib,
        flops,
        "pcie",
        host,
        OWN_DISK_GIB,
    )


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU model of a torch.cuda.get_device_name(); None if it is unknown. "NVIDIA A100" is not an "A10"."""
    fitting = [
        gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.device}(?![0-9A-Z]| Laptop| D\b)", device_name)
    ]
    return max(fitting, key=lambda gpu: len(gpu.device), default=None)


def family_of(device_name: str, has_bf16: bool) -> str:
    """The GPU family (key of FAMILIES) of a torch.cuda.get_device_name().

    An unknown GPU gets a family whose plan it can follow, the one that needs the least memory: a10, or t4 without bf16.
    """
    gpu = gpu_of(device_name)
    if gpu and (has_bf16 or FAMILIES[gpu.family].precision != "bf16"):
        return gpu.family
    return "a10" if has_bf16 else "t4"


def peak_of(device_name: str) -> float | None:
    """The data sheet's peak of a device, in FLOP/s; None for an unknown device."""
    gpu = gpu_of(device_name)
    return gpu.flops if gpu else None
