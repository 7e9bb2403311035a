"""Checks of packages, compiler, CUDA toolkit, GPUs and disk report what is missing, and only that."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import mounted, python
from training import errors, files
from training.files import SCRATCH, disk_problems, free_bytes, writable
from training.machine import environment, kernels
from training.machine.environment import cuda_toolkit_problems, mismatches, tool_problems, version_problems
from training.machine.kernels import kernel_problems, missing_kernels
from training.run.lock import one_writer

ROOT = Path(__file__).parents[2]
MIB = 2**20
GIB = 2**30


def executable(path: Path, script: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


# --- versions ----------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes packages appear installed, by their metadata, before those of the environment."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, version: str, *requires: str) -> None:
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {pin}" for pin in requires)]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    return install


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# what it needs\ntorch==2.13.0\ntransformers==5.23.0\nnumpy==2.4.6\nmatplotlib==3.11.2\n"
    )
    return file


def test_this_environment_has_the_pinned_versions() -> None:
    assert version_problems() == []
    assert mismatches(str(ROOT / "requirements_dev.txt")) == []


@pytest.mark.parametrize(
    ("changed", "mismatched"),
    [
        ({}, []),
        ({"torch": "2.13.0+cu126"}, []),  # a build for another GPU is the same version
        ({"torch": "2.13.0+cu130"}, []),
        ({"torch": "2.13.0+cpu"}, []),
        ({"numpy": "2.4.9"}, ["numpy"]),  # the patch release matters only for EXACT
        ({"matplotlib": "3.5.0"}, ["matplotlib"]),  # training does not import it
    ],
)
def test_compatible_versions_are_accepted_but_scripts_install_the_pins(
    installed, requirements: Path, changed: dict[str, str], mismatched: list[str]
) -> None:
    for name, version in ({"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"} | changed).items():
        installed(name, version)
    assert version_problems(requirements) == []
    assert mismatches(str(requirements)) == mismatched


def test_wrong_versions_and_missing_packages_are_reported_in_one_line(installed, requirements: Path) -> None:
    installed("torch", "2.12.1+cu126")
    installed("transformers", "5.23.1")
    installed("numpy", "1.26.4")
    requirements.write_text(requirements.read_text() + "no-such-package==1.0\n")
    assert version_problems(requirements) == [
        "Wrong package versions: torch 2.12.1 instead of 2.13.0; transformers 5.23.1 instead of 5.23.0; "
        "numpy 1.26.4 instead of 2.4.6; no no-such-package, expected 1.0. "
        f"Type python -m pip install -r {requirements}"
    ]


def test_an_installed_wheel_reads_the_pins_from_its_metadata(installed, tmp_path: Path) -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "dolly"
    installed("dolly", "1.0.0", "torch==2.13.0", "numpy==2.4.6", 'trl==1.16.0; extra == "trl"')
    installed("torch", "2.12.0")
    installed("numpy", "2.4.6")
    assert version_problems(tmp_path / "absent.txt") == [
        "Wrong package versions: torch 2.12.0 instead of 2.13.0. Type python -m pip install torch==2.13.0"
    ]


def test_advice_names_packages_where_there_is_no_repository_and_uv_where_there_is_no_pip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    required = [
        "torch==2.13.0",
        's3fs==2026.9.0; extra == "s3"',
        'a==1; extra == "mlflow"',
        "b==2 ; extra == 'mlflow'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    assert errors.install_extra("s3") == "python -m pip install s3fs==2026.9.0"
    assert errors.install_extra("mlflow") == "python -m pip install a==1 b==2"
    executable(tmp_path / "uv")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert errors.install_extra("spark") == "uv pip install '.[spark]'"


def test_the_checks_run_without_installed_packages_and_accept_missing_pins() -> None:
    bare = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from training.machine import environment; "
        "assert environment.version_problems(Path('none.txt')) == []; "
        "environment.tool_problems(); print(*environment.mismatches('requirements_dev.txt'))"
    )
    output = python("-I", "-S", "-c", bare, check=True).stdout  # -S: no site-packages
    assert {"torch", "deepspeed", "pytest"} <= set(output.split())


def test_the_checks_take_less_than_a_second(tmp_path: Path) -> None:
    begin = time.process_time()
    version_problems()
    tool_problems()
    kernel_problems()
    disk_problems({tmp_path / "model": GIB}, {tmp_path / "model": "the model"})
    with one_writer(tmp_path / "out"):
        pass
    assert time.process_time() - begin < 1


# --- compiler ----------------------------------------------------------------------------------------


@pytest.fixture
def only_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A PATH with only the named programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return lambda *names: [executable(folder / name) for name in names]


@pytest.fixture
def with_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    header = tmp_path / "include" / "Python.h"
    header.parent.mkdir()
    header.touch()
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda: {"include": str(header.parent)})
    return header


@pytest.mark.parametrize(
    ("programs", "cxx", "fix"),
    [
        ("ninja", None, "sudo apt-get install g++ (Debian, Ubuntu), or xcode-select --install (Mac)"),
        ("ninja g++", None, "export CXX=g++"),
        ("ninja g++ c++", "clang++-99", "export CXX=g++"),
        ("ninja g++ c++", "", "export CXX=g++"),
        ("ninja g++ c++", "ccache-of-old g++", "export CXX=g++"),
        ("ninja g++ c++", "g++ -O2", "export CXX=g++"),
    ],
)
@pytest.mark.usefixtures("with_headers")
def test_a_missing_compiler_is_reported_with_the_command_to_type(
    only_on_path, monkeypatch: pytest.MonkeyPatch, programs: str, cxx: str | None, fix: str
) -> None:
    only_on_path(*programs.split())
    compiler = "a C++ compiler, c++," if cxx is None else f"CXX is '{cxx}', which"
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    assert tool_problems() == [f"DeepSpeed compiles C++ operators, but {compiler} is not on PATH. Type {fix}"]


def test_a_compiler_in_a_folder_with_a_space_is_accepted(
    only_on_path, with_headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_on_path("ninja")
    monkeypatch.setenv("CXX", str(executable(tmp_path / "my tools" / "g++")))
    assert tool_problems() == []


def test_compiler_ninja_and_headers_suffice_and_missing_headers_are_reported(
    only_on_path, with_headers: Path
) -> None:
    only_on_path("c++", "ninja")
    assert tool_problems() == []
    with_headers.unlink()
    (problem,) = tool_problems()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert str(with_headers) in problem
    assert problem.endswith(f"Type sudo apt-get install python{version}-dev")


def test_a_missing_ninja_is_reported_with_its_install_or_path_command(
    only_on_path, with_headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_on_path("c++")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    (problem,) = tool_problems()
    assert problem.endswith("ninja is not on PATH. Type python -m pip install ninja")
    executable(tmp_path / "venv" / "bin" / "ninja")  # an environment that is not activated
    (problem,) = tool_problems()
    assert problem.endswith(f"Type export PATH={tmp_path}/venv/bin:$PATH")


def toolkit(home: Path, release: str, header: str = "include/cuda_runtime.h") -> Path:
    executable(
        home / "bin" / "nvcc",
        f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.85"\n',
    )
    (home / header).parent.mkdir(parents=True, exist_ok=True)
    (home / header).touch()
    return home


def test_a_cuda_toolkit_of_the_same_major_version_is_accepted(tmp_path: Path) -> None:
    assert cuda_toolkit_problems(toolkit(tmp_path / "same", "12.6"), "12.6") == []
    assert cuda_toolkit_problems(toolkit(tmp_path / "minor", "12.4"), "12.6") == []
    conda = toolkit(tmp_path / "conda", "12.6", "targets/x86_64-linux/include/cuda_runtime.h")
    assert cuda_toolkit_problems(conda, "12.6") == []


def test_a_missing_mismatched_or_incomplete_cuda_toolkit_is_reported(tmp_path: Path) -> None:
    (problem,) = cuda_toolkit_problems(None, "12.6")
    assert "nvcc was not found (CUDA_HOME is not set)" in problem
    assert "export CUDA_HOME=/usr/local/cuda-12.6" in problem
    (problem,) = cuda_toolkit_problems(tmp_path / "none", "12.6")
    assert f"nvcc was not found (CUDA_HOME is {tmp_path / 'none'})" in problem
    (problem,) = cuda_toolkit_problems(toolkit(tmp_path / "old", "11.8"), "13.0")
    assert "nvcc belongs to CUDA 11.8, but torch was built with CUDA 13.0" in problem
    (problem,) = cuda_toolkit_problems(toolkit(tmp_path / "my cuda", "13.0"), "13.0")
    assert (
        f"ln -s '{tmp_path}/my cuda' /a/path/without/spaces && export CUDA_HOME=/a/path/without/spaces"
        in problem
    )
    bare = toolkit(tmp_path / "bare", "13.0")
    (bare / "include" / "cuda_runtime.h").unlink()
    (problem,) = cuda_toolkit_problems(bare, "13.0")
    assert f"{bare / 'include'} has no cuda_runtime.h" in problem


# --- GPU ---------------------------------------------------------------------------------------------

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "arch_list", "missing"),
    [
        ((7, 0), CUDA_13, True),  # V100
        ((7, 0), CUDA_12_6, False),
        ((7, 5), CUDA_13, False),  # T4
        ((8, 0), CUDA_13, False),  # A100
        ((8, 6), ["sm_80"], False),  # A10 with the binary of an older minor version
        ((8, 0), ["sm_86"], True),  # but not of a newer one
        ((8, 9), ["sm_80", "sm_90"], False),  # L4
        ((9, 0), ["sm_80", "sm_86"], True),  # another major version
        ((9, 0), ["sm_80", "compute_80"], False),  # unless there is intermediate code
        ((7, 0), ["sm_80", "compute_80"], True),  # which runs only on newer GPUs
        ((9, 0), ["sm_90a"], False),
        ((10, 0), ["sm_90a", "compute_90a"], True),  # "a": only that architecture
        ((12, 0), CUDA_12_6, True),
        ((12, 1), ["sm_120f"], False),
        ((10, 3), ["compute_100f"], False),
        ((12, 0), ["compute_100f"], True),  # "f": only that family
        ((12, 0), ["sm_120"], False),  # three digits
        ((8, 0), ["gfx90a", ""], True),
        ((8, 0), [], True),
    ],
)
def test_binaries_run_within_a_major_version_and_intermediate_code_on_newer_gpus(
    capability: tuple[int, int], arch_list: list[str], missing: bool
) -> None:
    assert missing_kernels(capability, arch_list) is missing


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Makes torch report GPUs of (name, capability), and a build for `cuda` with kernels for `arch_list`."""

    def report(devices: list[tuple[str, tuple[int, int]]], cuda: str | None, arch_list: list[str]) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu" + (cuda or "").replace(".", ""))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: devices[gpu][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: devices[gpu][1])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arch_list)

    return report


def test_a_v100_with_a_cuda_13_build_is_reported_with_the_cuda_12_6_build(gpus) -> None:
    gpus([("NVIDIA A100-SXM4-40GB", (8, 0)), *[("Tesla V100-SXM2-32GB", (7, 0))] * 8], "13.0", CUDA_13)
    assert kernel_problems() == [
        "8 x Tesla V100-SXM2-32GB (sm_70): torch 2.13.0+cu130 has no kernels for it, only sm_75 sm_80 sm_86 sm_90 "
        "sm_100 sm_120 compute_120. Type python -m pip install torch==2.13.0+cu126 "
        "--index-url https://download.pytorch.org/whl/cu126"
    ]


def test_gpus_outside_the_oldest_build_get_the_newest_build_or_a_newer_gpu_as_advice(gpus) -> None:
    gpus([("NVIDIA B200", (10, 0)), ("Tesla K80", (3, 7))], "12.6", CUDA_12_6)
    newer, older = kernel_problems()
    assert newer.startswith("1 x NVIDIA B200 (sm_100)")
    assert "python -m pip uninstall -y torch && python -m pip install torch==2.13.0, or" in newer
    assert older.startswith("1 x Tesla K80 (sm_37)")
    assert older.endswith("Use a newer GPU")


def test_a_build_without_cuda_is_reported_only_if_a_gpu_is_visible(
    gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus([], None, [])
    monkeypatch.setattr(kernels, "_nvidia_gpu", lambda: False)
    assert kernel_problems() == []
    monkeypatch.setattr(kernels, "_nvidia_gpu", lambda: True)
    (problem,) = kernel_problems()
    assert "a build without CUDA" in problem
    assert "python -m pip uninstall -y torch && python -m pip install torch==2.13.0" in problem
    assert "export CUDA_VISIBLE_DEVICES=-1 to train on the CPU" in problem
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert kernel_problems() == []


def test_a_driver_that_is_too_old_is_reported_with_cudas_message(
    gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
        )

    gpus([], "13.0", CUDA_13)
    monkeypatch.setattr(kernels, "_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    (problem,) = kernel_problems()
    assert (
        "CUDA does not start: The NVIDIA driver on your system is too old (found version 11040)." in problem
    )
    assert "Update the driver to one for CUDA 13.0, type python -m pip install torch==2.13.0+cu126" in problem


def test_a_gpu_is_detected_as_a_device_file_or_by_nvidia_smi(tmp_path: Path, only_on_path) -> None:
    devices = tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidiactl").touch()  # images without a GPU may contain it and nvidia-smi
    assert not kernels._nvidia_gpu(devices)
    (smi,) = only_on_path("nvidia-smi")
    executable(smi, "#!/bin/sh\necho 'NVIDIA-SMI has failed' ; exit 9\n")
    assert not kernels._nvidia_gpu(devices)
    executable(smi, "#!/bin/sh\necho 'GPU 0: NVIDIA A10 (UUID: GPU-1)'\n")
    assert kernels._nvidia_gpu(devices)
    smi.unlink()
    (devices / "nvidia0").touch()
    assert kernels._nvidia_gpu(devices)


# --- disk --------------------------------------------------------------------------------------------


def fake_statvfs(monkeypatch: pytest.MonkeyPatch, blocks: int | None, available: int) -> None:
    def statvfs(path: Path) -> SimpleNamespace:
        if blocks is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return SimpleNamespace(f_blocks=blocks, f_bavail=available, f_frsize=4096, f_bsize=4096)

    monkeypatch.setattr(files.os, "statvfs", statvfs)


def test_the_needs_of_one_disk_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_statvfs(monkeypatch, blocks=100 * GIB // 4096, available=60 * GIB // 4096)
    model, steps = tmp_path / "new" / "model", tmp_path / "new" / "checkpoints"
    labels = {model: "the finished model", steps: "2 checkpoints"}
    remedies = {model: "name another folder", steps: "lower --save-total-limit"}
    assert disk_problems({model: 12 * GIB, steps: 48 * GIB}, labels, remedies) == []
    (problem,) = disk_problems({model: 12 * GIB, steps: 49 * GIB}, labels, remedies)
    assert (
        f"has 60.0 GiB free, but 61.0 GiB are needed: 12.0 GiB for the finished model ({model}), "
        f"49.0 GiB for 2 checkpoints ({steps}). Free 1.0 GiB there, or name another folder, or lower --save-total-limit"
        in problem
    )


@pytest.mark.parametrize(
    ("blocks", "available", "free"),
    [
        (0, 0, None),  # no size
        (0, 2**50, None),  # no size, but free
        (100, 200, None),  # more free than its size
        (100, -1, None),
        (100, 2**64 - 1, None),  # a negative number as unsigned
        (None, 0, None),  # a mount that does not answer
        (100, 0, 0),
    ],
)
def test_implausible_sizes_of_mounted_object_stores_are_ignored_but_a_full_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int | None, available: int, free: int | None
) -> None:
    fake_statvfs(monkeypatch, blocks, available)
    assert free_bytes(tmp_path) == free
    for needed in (1, 2**60):
        assert len(disk_problems({tmp_path: needed}, {tmp_path: "the model"})) == (free is not None)


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free = free_bytes(tmp_path / "not" / "yet" / "made")
    # The tolerance is for other processes that write to this disk.
    assert free == pytest.approx(disk.f_bavail * disk.f_frsize, abs=GIB)
    (tmp_path / "file").touch()
    assert free_bytes(tmp_path / "file" / "below") == pytest.approx(free, abs=GIB)


def leftover_of_a_killed_check(folder: Path) -> Path:
    program = (
        "import os, signal, pathlib; from training.files import writable\n"
        "pathlib.Path.rmdir = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"writable(pathlib.Path({str(folder)!r}))"
    )
    assert python("-c", program).returncode == -signal.SIGKILL
    [leftover] = folder.iterdir()
    assert leftover.name.startswith(SCRATCH)
    return leftover


def test_a_leftover_of_a_killed_write_check_is_removed_by_the_next(tmp_path: Path) -> None:
    leftover_of_a_killed_check(tmp_path)
    assert writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two users")
def test_another_users_leftover_in_a_shared_folder_does_not_block_the_check() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # other users cannot enter tmp_path
        shared = Path(name)
        shared.chmod(0o1777)
        leftover = leftover_of_a_killed_check(shared)
        os.setresuid(65534, 65534, 0)
        try:
            assert writable(shared)
        finally:
            os.setresuid(0, 0, 0)
        assert list(shared.iterdir()) == [leftover]


def test_concurrent_write_checks_of_ranks_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as ranks:
        assert all(ranks.map(writable, [tmp_path] * 4000))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    with mounted(tmp_path / "small", "1m") as folder:
        yield folder


def test_only_the_disk_that_is_too_small_is_reported(small_disk: Path, tmp_path: Path) -> None:
    model, steps, elsewhere = small_disk / "out" / "model", small_disk / "out" / "steps", tmp_path / "cache"
    labels = {model: "the finished model", steps: "1 checkpoint", elsewhere: "the download"}
    assert free_bytes(model) == MIB
    assert disk_problems({model: MIB // 2, steps: MIB // 2, elsewhere: 1}, labels) == []
    (small_disk / "older").write_bytes(bytes(MIB * 3 // 4))
    assert free_bytes(model) == MIB // 4
    (problem,) = disk_problems({model: MIB // 2, steps: MIB // 2, elsewhere: 1}, labels)
    assert problem.startswith(f"{small_disk} has 0.2 MiB free, but 1.0 MiB are needed")
    assert "the download" not in problem
