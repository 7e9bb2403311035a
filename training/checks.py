"""Whether this machine can train, asked before anything expensive: versions, compiler, GPU kernels, disk, one writer.

Each check returns its faults in words: what is wrong, what was expected, what to type. At its top this module
imports Python's own library alone, because config/environment.sh asks it before anything is installed.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]

# --- versions ----------------------------------------------------------------------------------------

# Training reaches into these, or its numbers come from them: any other version is another program.
EXACT = ("torch", "transformers", "accelerate", "deepspeed")
# The first draws the benchmark's chart; the second is looked for on PATH, wherever it comes from.
NOT_IMPORTED = ("matplotlib", "ninja")


def version_faults(requirements: Path = ROOT / "requirements.txt") -> list[str]:
    """Packages that training imports and that are not as pinned. Reads their metadata, imports none of them.

    Of the packages outside EXACT another patch release is let through.
    """
    pins = read_pins(requirements) if requirements.exists() else _pins_of_the_installed_package()
    told, cures = [], []
    for name, pin in pins.items():
        found = installed_version(name)
        if name in NOT_IMPORTED or found == pin:
            continue
        if found and name not in EXACT and found.split(".")[:2] == pin.split(".")[:2]:
            continue
        told.append(f"{name} {found} instead of {pin}" if found else f"no {name}, expected {pin}")
        cures.append(f"{name}=={pin}")
    if not told:
        return []
    what = f"-r {requirements}" if requirements.exists() else " ".join(cures)
    return [f"Installed is {'; '.join(told)}. Type python -m pip install {what}"]


def mismatches(requirements: str) -> list[str]:
    """The packages of a requirements file that are missing, or installed in any other version than pinned."""
    return [name for name, pin in read_pins(Path(requirements)).items() if installed_version(name) != pin]


def read_pins(requirements: Path) -> dict[str, str]:
    """{"torch": "2.13.0", ...} of a requirements file and of those that it names with -r."""
    pins: dict[str, str] = {}
    for line in requirements.read_text().splitlines():
        if line.startswith("-r "):
            pins |= read_pins(requirements.parent / line[3:].strip())
        elif match := re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)", line):
            pins[match[1]] = match[2]
    return pins


def installed_version(package: str) -> str | None:
    """Its version without the local part, as 2.13.0+cu126 is 2.13.0 for another GPU; None if it is not there."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins_of_the_installed_package() -> dict[str, str]:
    """A wheel has no requirements.txt, but the same pins in its metadata. Extras, which have a marker, are left out."""
    try:
        required = importlib.metadata.requires("dolly") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {m[1]: m[2] for line in required if (m := re.fullmatch(r"([\w.-]+)==([^\s;]+)", line))}


# --- compiler ----------------------------------------------------------------------------------------


def tool_faults() -> list[str]:
    """What a compilation of DeepSpeed's C++ operators needs, and is not here: compiler, Python's headers, ninja."""
    faults = []
    words = os.environ.get("CXX", "c++").split()  # as torch chooses it
    if not words or not shutil.which(words[0]):
        other = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        if other:
            cure = f"Type export CXX={other}"
        else:
            cure = "Type sudo apt-get install g++ (Debian, Ubuntu), or xcode-select --install (Mac)"
        asked = f"CXX is '{os.environ['CXX']}', which" if "CXX" in os.environ else "a C++ compiler, c++,"
        faults.append(f"DeepSpeed compiles C++ operators, and {asked} is not on PATH. {cure}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        faults.append(
            f"DeepSpeed compiles C++ operators, and Python's C headers are missing ({header}). "
            f"Type sudo apt-get install {python}-dev"
        )
    if not shutil.which("ninja"):
        folder = Path(sys.executable).parent
        cure = f"export PATH={folder}:$PATH" if (folder / "ninja").exists() else "python -m pip install ninja"
        faults.append(f"DeepSpeed compiles C++ operators, and ninja is not on PATH. Type {cure}")
    return faults


def cuda_toolkit_faults(home: Path | None, built_with: str) -> list[str]:
    """What a compilation of a CUDA operator needs: nvcc and headers, of the CUDA that torch was built with.

    Args:
        home: the toolkit's folder, as torch finds it (CUDA_HOME, else nvcc's, else /usr/local/cuda).
        built_with: torch.version.cuda, as in "12.6". Another minor version is compatible, another major is not.
    """
    major = built_with.split(".")[0]
    cure = (
        f"Install the CUDA {built_with} toolkit and export CUDA_HOME=/usr/local/cuda-{built_with}, or leave the "
        "'optimizer' out of the DeepSpeed JSON: torch's own AdamW needs no compilation"
    )
    nvcc = home / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        where = f"CUDA_HOME is {home}" if home else "CUDA_HOME is not set"
        return [f"DeepSpeed compiles a CUDA operator, and there is no nvcc ({where}). {cure}"]
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", told)
    if match and match[1] != major:
        return [
            f"DeepSpeed compiles a CUDA operator, and {nvcc} is of CUDA {match[1]}.{match[2]}, but torch of CUDA "
            f"{built_with}. {cure}"
        ]
    headers = [nvcc.parents[1] / "include", *nvcc.parents[1].glob("targets/*/include")]
    if not any((folder / "cuda_runtime.h").exists() for folder in headers):
        return [f"DeepSpeed compiles a CUDA operator, and {headers[0]} has no cuda_runtime.h. {cure}"]
    return []


# --- GPU ---------------------------------------------------------------------------------------------


def kernel_faults() -> list[str]:
    """GPUs that this build of torch cannot use, whether it says so or would silently train on the CPU."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # the last by Slurm
    if torch.version.hip or hidden:
        return []
    release, built = torch.__version__.split("+")[0], torch.version.cuda
    older = f"python -m pip install torch=={release}+cu126 --index-url https://download.pytorch.org/whl/cu126"
    newest = f"python -m pip uninstall -y torch && python -m pip install torch=={release}"
    if not torch.cuda.is_available():
        if not _nvidia_gpu():
            return []
        on_cpu = "or export CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
        if built is None:
            return [
                f"An NVIDIA GPU is here, but torch {torch.__version__} is a build without CUDA. "
                f"Type {newest} (for a V100 {older}), {on_cpu}"
            ]
        return [
            f"An NVIDIA GPU is here, but CUDA does not start: {_why_no_cuda()}. Update the driver to one for CUDA "
            f"{built}, type {older}, {on_cpu}"
        ]
    built_for = torch.cuda.get_arch_list()
    if not built_for:
        return []
    gpus = Counter(
        (torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu))
        for gpu in range(torch.cuda.device_count())
    )
    faults = []
    for (name, capability), count in gpus.items():
        if not missing_kernels(capability, built_for):
            continue
        if capability > max(_built_capability(arch) for arch in built_for):
            cure = f"Type {newest}, or use another GPU"
        elif built and built.startswith("12.6"):  # the build with the oldest kernels
            cure = "Use a newer GPU"
        else:
            cure = f"Type {older}"
        faults.append(
            f"{count} x {name} (sm_{capability[0]}{capability[1]}): torch {torch.__version__} has no kernels for it, "
            f"only {' '.join(built_for)}. {cure}"
        )
    return faults


def missing_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether nothing of a torch build runs on a GPU.

    A binary (sm_86) runs on its own major version from its minor version on, intermediate code (compute_80) on
    everything that is newer. A name that ends in "a" is for that one architecture, in "f" for its family.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility and #ptx-compatibility

    Args:
        capability: (major, minor), as torch.cuda.get_device_capability gives it.
        arch_list: as torch.cuda.get_arch_list gives it.
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
    """ "sm_75" -> (7, 5), "compute_120" -> (12, 0); (0, 0) for a name that says nothing."""
    match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[af]?", arch)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _nvidia_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether the system shows an NVIDIA GPU. nvidia-smi alone is no proof: images have it without a GPU."""
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


# --- disk --------------------------------------------------------------------------------------------


def disk_faults(needs: Mapping[Path, int], labels: Mapping[Path, str]) -> list[str]:
    """File systems with less free than will be written on them.

    Args:
        needs: bytes that will be written below each path, which need not exist yet.
        labels: what they are for, as in {Path("/disk/out/checkpoints"): "2 checkpoints"}.
    """
    by_device: dict[int, list[Path]] = {}
    for path in needs:
        by_device.setdefault(nearest_existing(path).stat().st_dev, []).append(path)
    faults = []
    for paths in by_device.values():
        needed, free = sum(needs[path] for path in paths), free_bytes(paths[0])
        if free is None or needed <= free:
            continue
        purposes = ", ".join(f"{size_in_words(needs[path])} for {labels[path]} ({path})" for path in paths)
        faults.append(
            f"{_mount_point(paths[0])} has {size_in_words(free)} free, and {size_in_words(needed)} are needed: {purposes}. "
            f"Free {size_in_words(needed - free)} there, lower --save-total-limit, or use a larger disk "
            "(--local-output-dir, and HF_HOME for what is downloaded)"
        )
    return faults


def free_bytes(path: Path) -> int | None:
    """Bytes that we may still write on the file system of `path`, which need not exist yet.

    None where the answer cannot be trusted: object stores mounted as folders report no size at all, or more free
    than there is.
    """
    try:
        told = os.statvfs(nearest_existing(path))
    except OSError:
        return None
    if told.f_blocks <= 0 or not 0 <= told.f_bavail <= told.f_blocks:
        return None
    return told.f_bavail * (told.f_frsize or told.f_bsize)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists and can be looked at."""
    path = path.absolute()
    while path != path.parent:
        with contextlib.suppress(OSError):
            if path.exists():
                return path
        path = path.parent
    return path


TRACE = ".dolly-"  # how the names of what is made for a trial begin; a killed process leaves it, and it holds nothing


def writable(folder: Path) -> bool:
    """Whether `folder` can be made, or written: tried in its nearest parent that exists.

    Permissions alone tell too little: root has them all, also where NFS or /proc let nobody make anything.
    """
    try:
        if any(part.is_symlink() and not part.exists() for part in (folder, *folder.parents)):
            return False  # a link to nowhere: nothing can be made in its place
        trial = nearest_existing(folder) / f"{TRACE}trial-{os.getuid()}"
        # One name for all of a user: what a killed trial left is taken away by the next; the other ranks try it at this
        # moment. Another user's cannot be taken away in a shared folder, as /tmp is.
        with contextlib.suppress(FileExistsError):
            trial.mkdir()
        with contextlib.suppress(FileNotFoundError):
            trial.rmdir()
    except OSError:
        return False
    return True


def _mount_point(path: Path) -> Path:
    path = nearest_existing(path).resolve()
    while path != path.parent and path.parent.stat().st_dev == path.stat().st_dev:
        path = path.parent
    return path


def size_in_words(count: int) -> str:
    """Bytes as "12.3 GiB", or as MiB below a tenth of one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


# --- one writer --------------------------------------------------------------------------------------

WRITER_LOCK = ".writer.lock"
WRITER_INFO = ".writer.json"
WRITER_FILES = (WRITER_LOCK, WRITER_INFO)  # what a killed run leaves beside its own files

# How file systems say that they have no locks: NFS without its lock daemon, Lustre mounted without flock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def system_lock(file: Path, patience: float = -1) -> AbstractContextManager[Any] | None:
    """Takes a lock that the system takes back from a dead process, however it died; leaving the context releases it.

    None where the file system has no locks. Raises filelock.Timeout where another process holds it for `patience`
    seconds; -1: waits for ever.
    """
    from filelock import FileLock

    try:
        # Without locks of the system filelock would fall back to a file that outlives a killed process.
        return FileLock(file, fallback_to_soft=False).acquire(timeout=patience)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


class FolderBusyError(RuntimeError):
    """Another process writes into the folder. The message says which, and what to do."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if need be) as its only writer; one rank of a run does. Raises FolderBusyError.

    Nothing is left to clean up by hand, however the process ends.
    """
    from filelock import Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = system_lock(folder / WRITER_LOCK, patience=0)
    except Timeout as error:
        raise FolderBusyError(_who_writes(folder)) from error
    if held is None:
        logger.warning(
            "%s: its file system has no locks, so nothing stops a second run from writing into it. Start only one",
            folder,
        )
        yield
        return
    with held:
        try:
            with contextlib.suppress(OSError):  # it only tells others who we are
                (folder / WRITER_INFO).write_text(
                    json.dumps(
                        {
                            "pid": os.getpid(),
                            "host": socket.gethostname(),
                            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                        }
                    )
                )
            yield
        finally:
            # Both go while the lock is held; filelock never takes a lock on a file that has lost its name.
            for name in WRITER_FILES[::-1]:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _who_writes(folder: Path) -> str:
    try:
        info = json.loads((folder / WRITER_INFO).read_text())
        who = f"process {info['pid']} on {info['host']}, since {info['since']}"
        stop = f"stop it (kill {info['pid']} on {info['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        who, stop = "it has not said which", "stop it"
    return (
        f"{folder}: another run is writing into it ({who}). "
        f"Wait until it has ended, {stop}, or name another --local-output-dir"
    )
