"""Installed packages and the C++ compiler, compared with what training needs.

Imports Python's standard library alone: config/environment.sh calls it before anything is installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from training.consts import ROOT

# Training reaches into these, or its numbers come from them: any other version is another program.
EXACT = ("torch", "transformers", "accelerate", "deepspeed")

# The first draws the benchmark's chart; the second is looked for on PATH, wherever it comes from.
NOT_IMPORTED = ("matplotlib", "ninja")


def version_problems(requirements: Path = ROOT / "requirements.txt") -> list[str]:
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


def tool_problems() -> list[str]:
    """What a compilation of DeepSpeed's C++ operators needs, and is not here: compiler, Python's headers, ninja."""
    problems = []
    words = os.environ.get("CXX", "c++").split()  # as torch chooses it
    if not words or not shutil.which(words[0]):
        other = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        if other:
            cure = f"Type export CXX={other}"
        else:
            cure = "Type sudo apt-get install g++ (Debian, Ubuntu), or xcode-select --install (Mac)"
        asked = f"CXX is '{os.environ['CXX']}', which" if "CXX" in os.environ else "a C++ compiler, c++,"
        problems.append(f"DeepSpeed compiles C++ operators, and {asked} is not on PATH. {cure}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        problems.append(
            f"DeepSpeed compiles C++ operators, and Python's C headers are missing ({header}). "
            f"Type sudo apt-get install {python}-dev"
        )
    if not shutil.which("ninja"):
        folder = Path(sys.executable).parent
        cure = f"export PATH={folder}:$PATH" if (folder / "ninja").exists() else "python -m pip install ninja"
        problems.append(f"DeepSpeed compiles C++ operators, and ninja is not on PATH. Type {cure}")
    return problems


def cuda_toolkit_problems(home: Path | None, built_with: str) -> list[str]:
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
