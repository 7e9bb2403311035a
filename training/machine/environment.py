"""Checks installed packages, the C++ compiler and the CUDA toolkit against the requirements of training.

Imports only the standard library: config/environment.sh uses it before any package is installed."""

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

from training.consts import CONFIG
from training.errors import install_extra, pip_install

# Training uses internals of these packages, or its results depend on them, so their versions must match the pins.
EXACT = ("torch", "transformers", "accelerate", "deepspeed")

# matplotlib only draws pictures; ninja is a program, which tool_problems looks for on PATH.
NOT_IMPORTED = ("matplotlib", "ninja")


# Beside config/. An installed wheel has none, and a file of that name in site-packages would not be ours.
REQUIREMENTS = CONFIG.parent / "requirements.txt"


def version_problems(requirements: Path = REQUIREMENTS) -> list[str]:
    """Packages imported by training whose version differs from the pin. Reads only metadata.

    Packages outside EXACT may differ in the patch release.
    """
    pins = read_pins(requirements) if requirements.exists() else _pins_of_installed_wheel()
    differing = []  # (description, pin)
    for name, pin in pins.items():
        version = installed_version(name)
        patch_differs = version and name not in EXACT and version.split(".")[:2] == pin.split(".")[:2]
        if name in NOT_IMPORTED or version == pin or patch_differs:
            continue
        description = f"{name} {version} instead of {pin}" if version else f"no {name}, expected {pin}"
        differing.append((description, f"{name}=={pin}"))
    if not differing:
        return []
    descriptions, needed = zip(*differing, strict=True)
    packages = f"-r {shlex.quote(str(requirements))}" if requirements.exists() else " ".join(needed)
    return [f"Wrong package versions: {'; '.join(descriptions)}. Type {pip_install(packages)}"]


def mismatches(requirements: str) -> list[str]:
    """Packages of a requirements file that are missing or whose version differs from the pin."""
    return [name for name, pin in read_pins(Path(requirements)).items() if installed_version(name) != pin]


def read_pins(requirements: Path) -> dict[str, str]:
    """{"torch": "2.13.0", ...} of a requirements file and the files that it includes with -r."""
    pins: dict[str, str] = {}
    for line in requirements.read_text().splitlines():
        if line.startswith("-r "):
            pins |= read_pins(requirements.parent / line[3:].strip())
        elif match := re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)", line):
            pins[match[1]] = match[2]
    return pins


def installed_version(package: str) -> str | None:
    """Version of a package without its local part (2.13.0+cu126 is 2.13.0); None if it is not installed."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def lora_package_problems(lora: bool, quantize: bool) -> list[str]:
    """Packages that --lora and --quantize need and that are not installed."""
    needed = {"--lora": "peft"} if lora else {}
    needed |= {"--quantize": "bitsandbytes"} if quantize else {}
    return [
        f"{flag} needs the package {package}, which is not installed. Type {install_extra('lora')}"
        for flag, package in needed.items()
        if installed_version(package) is None
    ]


def _pins_of_installed_wheel() -> dict[str, str]:
    """Pins in the metadata of our wheel, which contains no requirements.txt. Skips extras, which have a marker."""
    try:
        required = importlib.metadata.requires("dolly") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {m[1]: m[2] for line in required if (m := re.fullmatch(r"([\w.-]+)==([^\s;]+)", line))}


def tool_problems() -> list[str]:
    """Missing tools for compiling DeepSpeed's C++ operators: compiler, Python's headers, ninja."""
    missing = []  # (description, fix)
    if not shutil.which(os.environ.get("CXX", "c++")):  # like torch, which allows no arguments in CXX
        other = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        install = "sudo apt-get install g++ (Debian, Ubuntu), or xcode-select --install (Mac)"
        compiler = f"CXX is '{os.environ['CXX']}', which" if "CXX" in os.environ else "a C++ compiler, c++,"
        missing.append((f"{compiler} is not on PATH", f"export CXX={other}" if other else install))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        missing.append((f"Python's C headers are missing ({header})", f"sudo apt-get install {package}"))
    if not shutil.which("ninja"):
        folder = Path(sys.executable).parent
        installed = (folder / "ninja").exists()
        fix = f"export PATH={shlex.quote(str(folder))}:$PATH" if installed else pip_install("ninja")
        missing.append(("ninja is not on PATH", fix))
    return [
        f"DeepSpeed compiles C++ operators, but {description}. Type {fix}" for description, fix in missing
    ]


def cuda_toolkit_problems(home: Path | None, built_with: str) -> list[str]:
    """Problems of the CUDA toolkit: nvcc and headers must exist and match the CUDA that torch was built with.

    Args:
        home: folder of the toolkit that torch uses (CUDA_HOME, else nvcc's, else /usr/local/cuda).
        built_with: torch.version.cuda, such as "12.6". The minor version may differ, the major version may not.
    """
    nvcc = home / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        problem = f"nvcc was not found ({f'CUDA_HOME is {home}' if home else 'CUDA_HOME is not set'})"
    elif " " in str(home):
        link = "/a/path/without/spaces"
        return [
            f"DeepSpeed compiles a CUDA operator, but torch cannot link it with CUDA in {home}: the path has a space. "
            f"Type ln -s {shlex.quote(str(home))} {link} && export CUDA_HOME={link}"
        ]
    else:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        match = re.search(r"release (\d+)\.(\d+)", output)
        headers = [nvcc.parents[1] / "include", *nvcc.parents[1].glob("targets/*/include")]
        if match and match[1] != built_with.split(".")[0]:
            problem = (
                f"{nvcc} belongs to CUDA {match[1]}.{match[2]}, but torch was built with CUDA {built_with}"
            )
        elif not any((folder / "cuda_runtime.h").exists() for folder in headers):
            problem = f"{headers[0]} has no cuda_runtime.h"
        else:
            return []
    return [
        f"DeepSpeed compiles a CUDA operator, but {problem}. Install the CUDA {built_with} toolkit and export "
        f"CUDA_HOME=/usr/local/cuda-{built_with}, or remove the 'optimizer' from the DeepSpeed JSON: torch's AdamW "
        "needs no compilation"
    ]
