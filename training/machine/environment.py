"""Installed packages and the C++ compiler, compared with what training needs.

Imports Python's standard library alone: config/environment.sh calls it before anything is installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from training.consts import ROOT

# Training reaches into these, or its numbers come from them, so they must have the pinned version exactly.
EXACT = ("torch", "transformers", "accelerate", "deepspeed")

# The first draws pictures; the second is looked for on PATH, wherever it comes from.
NOT_IMPORTED = ("matplotlib", "ninja")


def version_problems(requirements: Path = ROOT / "requirements.txt") -> list[str]:
    """Packages that training imports and that differ from the pins. Reads their metadata and imports none of them.

    Packages outside EXACT may differ in the patch release.
    """
    pins = read_pins(requirements) if requirements.exists() else _pins_of_the_installed_package()
    differing = []  # (what, the pin)
    for name, pin in pins.items():
        found = installed_version(name)
        patch = found and name not in EXACT and found.split(".")[:2] == pin.split(".")[:2]
        if name in NOT_IMPORTED or found == pin or patch:
            continue
        what = f"{name} {found} instead of {pin}" if found else f"no {name}, expected {pin}"
        differing.append((what, f"{name}=={pin}"))
    if not differing:
        return []
    words, wanted = zip(*differing, strict=True)
    what = f"-r {shlex.quote(str(requirements))}" if requirements.exists() else " ".join(wanted)
    return [f"Installed is {'; '.join(words)}. Type python -m pip install {what}"]


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
    """Its version without the local part (2.13.0+cu126 is 2.13.0 for another GPU); None if it is not installed."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins_of_the_installed_package() -> dict[str, str]:
    """The pins in the metadata of the wheel, which has no requirements.txt. Extras have a marker and are left out."""
    try:
        required = importlib.metadata.requires("dolly") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {m[1]: m[2] for line in required if (m := re.fullmatch(r"([\w.-]+)==([^\s;]+)", line))}


def tool_problems() -> list[str]:
    """What DeepSpeed needs to compile its C++ operators and is missing: compiler, Python's headers, ninja."""
    missing = []  # (what, how to get it)
    if not shutil.which(os.environ.get("CXX", "c++")):  # as torch chooses it: one program, no options
        other = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        install = "sudo apt-get install g++ (Debian, Ubuntu), or xcode-select --install (Mac)"
        named = f"CXX is '{os.environ['CXX']}', which" if "CXX" in os.environ else "a C++ compiler, c++,"
        missing.append((f"{named} is not on PATH", f"export CXX={other}" if other else install))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        missing.append((f"Python's C headers are missing ({header})", f"sudo apt-get install {package}"))
    if not shutil.which("ninja"):
        folder = Path(sys.executable).parent
        installed = (folder / "ninja").exists()
        cure = f"export PATH={shlex.quote(str(folder))}:$PATH" if installed else "python -m pip install ninja"
        missing.append(("ninja is not on PATH", cure))
    return [f"DeepSpeed compiles C++ operators, and {what}. Type {cure}" for what, cure in missing]


def cuda_toolkit_problems(home: Path | None, built_with: str) -> list[str]:
    """What a CUDA operator needs to be compiled and is missing: nvcc and headers, of the CUDA that torch was built with.

    Args:
        home: the toolkit's folder, as torch finds it (CUDA_HOME, else nvcc's, else /usr/local/cuda).
        built_with: torch.version.cuda, as in "12.6". Another minor version is compatible, another major is not.
    """
    nvcc = home / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        problem = f"there is no nvcc ({f'CUDA_HOME is {home}' if home else 'CUDA_HOME is not set'})"
    elif " " in str(home):
        link = "/a/path/without/spaces"
        return [
            f"DeepSpeed compiles a CUDA operator, and torch cannot link it with CUDA in {home}, whose path has a space. "
            f"Type ln -s {shlex.quote(str(home))} {link} && export CUDA_HOME={link}"
        ]
    else:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        match = re.search(r"release (\d+)\.(\d+)", printed)
        headers = [nvcc.parents[1] / "include", *nvcc.parents[1].glob("targets/*/include")]
        if match and match[1] != built_with.split(".")[0]:
            problem = f"{nvcc} is of CUDA {match[1]}.{match[2]}, but torch of CUDA {built_with}"
        elif not any((folder / "cuda_runtime.h").exists() for folder in headers):
            problem = f"{headers[0]} has no cuda_runtime.h"
        else:
            return []
    return [
        f"DeepSpeed compiles a CUDA operator, and {problem}. Install the CUDA {built_with} toolkit and export "
        f"CUDA_HOME=/usr/local/cuda-{built_with}, or leave the 'optimizer' out of the DeepSpeed JSON: torch's own AdamW "
        "needs no compilation"
    ]
