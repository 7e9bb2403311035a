"""The catalogue of machines, and the resources of this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from training.consts import GIB
from training.errors import MachineError
from training.machine.catalogue import (
    FAMILIES,
    GPUS,
    LINKS,
    MACHINES,
    described_machine,
    family_of,
    find_machine,
    gpu_of,
    usable_host_gib,
)
from training.machine.local import free_host_gib, gpu_memory_taken_gib, this_machine


@pytest.mark.parametrize(
    "name", "8xA100-40GB 8xA100-80GB 8xH100 4xA10 2xA10 8xV100-32GB 3xA100-80GB Standard_ND96asr_v4 p4d.24xlarge "
    "8xH200 8xB200 g4dn.xlarge g5.24xlarge g6.2xlarge g6e.xlarge p5en.48xlarge p6-b200.48xlarge Standard_NC24ads_A100_v4 "
    "Standard_NC40ads_H100_v5 Standard_ND96isr_H200_v5 g2-standard-8 a3-megagpu-8g a3-ultragpu-8g 1xT4 2xL4 1xRTX-4090 "
    "1xrtx-3090 2xA6000 1xL40S Standard_NV72ads_A10_v5 p3dn.24xlarge Standard_ND40rs_v2 P5.48XLARGE a2-highgpu-8g".split()
)  # fmt: skip
def test_common_machines_are_in_the_catalogue(name):
    assert find_machine(name).name.lower() == name.lower()


def test_every_machine_has_a_known_gpu_and_plausible_sizes():
    for machine in MACHINES.values():
        gpu = GPUS[machine.gpu]
        assert (machine.family, machine.flops, machine.link) == (gpu.family, gpu.flops, gpu.link)
        assert 14 < machine.host_gib / machine.count <= 512
        assert machine.disk_gib > 100
    for name, gpu in GPUS.items():
        assert gpu.family in FAMILIES
        assert gpu.link in LINKS
        label = re.search(r"-(\d+)GB", name)  # CUDA reports less than the label
        assert not label or 0.9 < gpu.memory_gib / int(label[1]) < 1
    assert find_machine("p4d.24xlarge").disk_gib == pytest.approx(7450.6, abs=0.1)  # 8 x 1000 GB


def test_every_gpu_has_the_dense_peak_of_its_data_sheet_in_16_bit():
    assert {name: round(gpu.flops / 1e12, 1) for name, gpu in GPUS.items()} == {
        "T4": 65,
        "V100-32GB": 125,
        "L4": 121,
        "A10": 125,
        "A10G": 70,
        "RTX-3090": 71,
        "RTX-4090": 165.2,
        "A6000": 154.8,
        "L40": 181,
        "L40S": 362,
        "A100-40GB": 312,
        "A100-80GB": 312,
        "A100-80GB-PCIe": 312,
        "H100": 989.5,
        "H100-PCIe": 756,
        "H100-NVL": 835.5,
        "H200": 989.5,
        "H200-NVL": 835.5,
        "B200": 2250,
    }


def test_a_count_and_a_gpu_name_a_workstation():
    for name in ("2xRTX-4090", "2x rtx 4090", "2xRTX4090"):
        machine = find_machine(name)
        assert (machine.name, machine.gpu, machine.count) == ("2xRTX-4090", "RTX-4090", 2)
        assert (machine.host_gib, machine.link) == (usable_host_gib(128), "pcie")
    assert find_machine("4xA10").gpu == "A10G", "a name of the table counts first"


def test_two_figures_describe_ones_own_machine():
    machine = described_machine(2, 24, 165e12)
    assert (machine.family, machine.count, machine.gpu_memory_gib) == ("a10", 2, 24)
    assert (machine.flops, machine.host_gib) == (165e12, usable_host_gib(128))
    assert described_machine(1, 24, 165e12, 32).host_gib == usable_host_gib(32) == 0.96 * 32 - 1


def test_an_unknown_machine_is_refused_and_the_nearest_are_listed():
    for typed, nearest in (
        ("p4d.24xlrge", "p4d.24xlarge"),
        ("g5.2xlage", "g5.2xlarge"),
        ("8xA100-81GB", "8xA100-80GB"),
        ("2xRTX-4080", "2xRTX-4090"),
    ):
        with pytest.raises(
            MachineError,
            match=rf"unknown machine '{typed}'. Nearest: .*{nearest}.* Known are .*--gpu-memory and --gpu-flops",
        ):
            find_machine(typed)


@pytest.mark.parametrize(
    ("device", "has_bf16", "family"),
    [
        ("NVIDIA A100-SXM4-40GB", True, "a100"),
        ("NVIDIA H100 80GB HBM3", True, "h100"),
        ("NVIDIA H200", True, "h100"),
        ("NVIDIA A10G", True, "a10"),
        ("NVIDIA L4", True, "a10"),
        ("Tesla V100-SXM2-32GB", False, "v100"),
        ("Tesla T4", False, "t4"),
        ("NVIDIA L40S", True, "a10"),
        ("NVIDIA GeForce RTX 4090", True, "a10"),
        ("NVIDIA B200", True, "h100"),
        ("NVIDIA GeForce RTX 5090", True, "a10"),  # unknown
        ("Quadro RTX 6000", False, "t4"),  # unknown
    ],
)
def test_a_gpu_gets_a_family_whose_precision_it_supports(device, has_bf16, family):
    assert family_of(device, has_bf16) == family


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100X", None),
    ],
)
def test_a_device_is_known_by_the_longest_words_that_fit(device, gpu):
    assert gpu_of(device) == (GPUS[gpu] if gpu else None)


def test_this_machine_reports_free_memory_and_the_free_disk_of_a_new_folder(tmp_path):
    machine = this_machine(tmp_path / "not" / "yet", num_gpus=3)
    assert (machine.family, machine.count) == ("cpu", 3)
    assert machine.disk_gib == pytest.approx(shutil.disk_usage(tmp_path).free / GIB, abs=5)
    assert 0 < machine.host_gib <= psutil.virtual_memory().total / GIB


def cgroup(folder: Path, limit: str, used: str, stat: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(used)
    (folder / "memory.stat").write_text(stat)
    return folder


def test_free_memory_respects_the_containers_limit_without_cached_files(tmp_path):
    unlimited = free_host_gib(tmp_path)
    assert unlimited == pytest.approx(psutil.virtual_memory().available / GIB, abs=1)
    # A limit of 1 GiB; 0.75 GiB are used, of which 0.5 GiB are cached files.
    container = cgroup(
        tmp_path / "v2", f"{2**30}\n", f"{3 * 2**28}\n", f"anon {2**28}\ninactive_file {2**29}\n"
    )
    assert free_host_gib(container) == 0.75
    assert free_host_gib(cgroup(tmp_path / "v2", "max\n", "1\n", "")) == pytest.approx(unlimited, abs=1)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch sees the second and the third of three A100s; the file nvidia-smi in the returned folder answers for all."""
    gpus = [
        SimpleNamespace(name="NVIDIA A100-SXM4-40GB", major=8, total_memory=int(39.4 * GIB), uuid=uuid)
        for uuid in ("bbb-2", "ccc-3")
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setenv("PATH", str(tmp_path))
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU-aaa-1, 40000'\necho 'GPU-bbb-2, 3'\necho 'GPU-ccc-3, 10240'\n")
    smi.chmod(0o755)
    return smi


def test_the_gpu_with_the_least_free_memory_counts_without_what_other_processes_use(two_gpus: Path) -> None:
    assert gpu_memory_taken_gib() == [pytest.approx(3 / 1024), 10.0], (
        "found by the GPU's id, not by its number"
    )
    machine = this_machine()
    assert (machine.count, machine.gpu_memory_gib, machine.taken_gib) == (2, pytest.approx(29.4), 10.0)
    assert this_machine(num_gpus=1).gpu_memory_gib == pytest.approx(39.4, abs=0.01), (
        "the launcher uses the first"
    )
    # A rank asked before its own context existed, and that answer counts.
    assert this_machine(taken_gib=[0.0, 2.0]).gpu_memory_gib == pytest.approx(37.4)


@pytest.mark.parametrize("count", [0, -1])
def test_a_run_without_devices_is_refused_on_gpus_and_on_a_cpu(
    count: int, request: pytest.FixtureRequest
) -> None:
    refused = re.escape(f"--num-gpus {count}: at least one device is needed")
    with pytest.raises(MachineError, match=refused):
        this_machine(num_gpus=count)
    request.getfixturevalue("two_gpus")
    with pytest.raises(MachineError, match=refused):
        this_machine(num_gpus=count)


@pytest.mark.parametrize("answer", ["echo 'GPU-bbb-2, [N/A]'", "exit 9", "echo No devices were found"])
def test_without_an_answer_of_nvidia_smi_all_memory_counts_as_free(two_gpus: Path, answer: str) -> None:
    two_gpus.write_text(f"#!/bin/sh\n{answer}\n")
    assert gpu_memory_taken_gib() == [0.0, 0.0]
    assert this_machine().gpu_memory_gib == pytest.approx(39.4)
    two_gpus.unlink()
    assert this_machine().taken_gib == 0.0
