"""The package works from its wheel, in a folder without the repository."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.test_docs import PAGES, code

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(file.name for file in (ROOT / "config").glob("*.json"))

pytest.importorskip("pip")
if int(version("setuptools").split(".")[0]) < 77:
    pytest.skip("pyproject.toml needs setuptools 77", allow_module_level=True)


def run(*words: object, cwd: Path, **how: object) -> str:
    result = subprocess.run(
        [*map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip_wheel(source: str, cwd: Path) -> Path:
    """The wheel of a folder or an sdist, built without network."""
    words = ("wheel", "--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", "wheels", source)
    run(sys.executable, "-m", "pip", *words, cwd=cwd)
    [wheel] = (cwd / "wheels").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files that a wheel is made of, because a build leaves folders there."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("training", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return pip_wheel(".", source)


def test_folder_and_sdist_give_the_same_wheel_with_the_configs_in_the_package(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=source)
    [sdist] = (source / "dist").iterdir()
    names = set(ZipFile(wheel).namelist())
    assert set(ZipFile(pip_wheel(str(sdist), tmp_path)).namelist()) == names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"training"}
    modules = {file.relative_to(source).as_posix() for file in (source / "training").rglob("*.py")}
    assert {name for name in names if name.startswith("training/")} == {
        *modules,
        *(f"training/config/{name}" for name in CONFIGS),
    }
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"build/", "dist/", "*.egg-info/"} <= set(ignored), "a build leaves them in the folder"


def commands_of_the_pages() -> list[tuple[str, list[str]]]:
    """(module, words) of every command of ours in README and docs that is written out.

    The folders of a GPU machine's disk become relative: a model that is named must exist.
    """
    lines = [line.replace("/local_disk0/dolly_training/", "") for page in PAGES for line in code(page)]
    found = [re.search(r"(?:^|\s)(?:-m|--module) (training\.\w+)(\s.*|$)", line) for line in lines]
    commands = [(match[1], shlex.split(match[2], comments=True)) for match in found if match]
    demos = [re.fullmatch(r"\./run_demo\.sh( [^#]*|)(#.*)?", line) for line in lines]
    commands += [("training.demo", shlex.split(match[1])) for match in demos if match]
    whole = [(module, words) for module, words in commands if words and "..." not in words]
    return [(module, words) for module, words in whole if "--help" not in words]


@pytest.mark.slow
def test_the_commands_of_the_pages_run_from_an_installed_wheel_in_another_folder(
    wheel: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    # The environment lies in the repository of another project, with files of its own.
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    run("git", "init", "--quiet", cwd=tmp_path)
    run(*git, "commit", "--quiet", "--allow-empty", "--message", "another project", cwd=tmp_path)
    [packages] = tmp_path.glob("venv/lib/python3*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    (packages / "requirements.txt").write_text("torch==0.0.1\n")
    words = ("install", "--quiet", "--no-deps", "--target", packages, wheel)
    run(sys.executable, "-m", "pip", *words, cwd=tmp_path)
    work, python = tmp_path / "work", tmp_path / "venv" / "bin" / "python"
    for name in ("docs", "dolly/checkpoint-400"):  # for --plot docs/demo.png, --model dolly and --checkpoint
        (work / name).mkdir(parents=True)
    for name in ("rows.jsonl", "prompts.txt", "questions.jsonl"):
        (work / name).touch()
    for name in ("flows", "notebooks"):  # a wheel does not bring them
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "METAFLOW_USER": "tester"}

    pages = commands_of_the_pages()
    assert {module for module, _ in pages} == {
        f"training.{name}"
        for name in "trainer launch generate export publish demo notebook bench page plan tracking evaluate".split()
    }
    script = shutil.copy(ROOT / "tests" / "installed_commands.py", tmp_path)
    text = run(python, script, cwd=work, env=environment, input=json.dumps(pages))
    assert "DeepSpeed ZeRO-3" in text, text
    answers = json.loads(text.splitlines()[-1])
    assert answers["packages"] == [str(packages / "training"), "work"]
    assert answers["missing"].endswith(
        "Available are: " + ", ".join(str(packages / "training" / "config" / name) for name in CONFIGS)
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert answers["extra"] == f"python -m pip install {extras['s3'][0]}"
    assert answers["own"] == {"of": "the working folder"}
    for command in ("demo", "plan", "notebook", "generate", "publish", "export"):
        assert answers[command][0] == 0, answers[command]
    assert "--deepspeed config/ds_z3_bf16_config.json" in answers["plan"][1]
    assert answers["sources"] == [str(packages / "training")]
    assert (work / "copy" / "run.json").is_file()
    assert (work / "exported" / "run.json").is_file()
    assert json.loads((work / "out" / "run.json").read_text())["git_commit"] is None
    assert (work / "new.ipynb").is_file()

    empty = tmp_path / "empty"
    empty.mkdir()
    few = "--max-steps 2 --test-size 20 --input-model demo --training-dataset demo --local-output-dir out".split()
    run(python, "-m", "training.trainer", *few, cwd=empty, env=environment)
    assert json.loads((empty / "out" / "run.json").read_text())["status"] == "finished"
    assert [path.name for path in empty.iterdir()] == ["out"]
