"""Every command, option, module and file that README and the scripts name exists."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import click
import pytest
import torch.distributed.run
from deepspeed.launcher import runner

from tests.conftest import python
from training import trainer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run", *sorted((ROOT / "config").glob("*.sh"))]
DOCUMENTS = [ROOT / "README.md", *SCRIPTS]
EACH_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

# What a command line may run, by the words that name it there: the modules of ours that have a command, ...
OURS = {
    "training."
    + file.relative_to(ROOT / "training").with_suffix("").as_posix().removesuffix("/__main__"): file
    for file in (ROOT / "training").rglob("*.py")
    if "\ndef main(" in file.read_text()
}
OURS["run_demo.sh"] = OURS["training.demo"]
# ... the flow, whose command line is Metaflow's, ...
FLOW = "flows/train_dolly_flow.py"
OURS["flows/model_on_s3.py"] = ROOT / "flows" / "model_on_s3.py"
# ... Python's tools, and one of a Mac, which cannot be asked here.
PYTHON_TOOLS = {
    "run_pytest.sh": ["pytest"],  # hands its arguments on
    "pytest": ["pytest"],
    "pip install": ["pip", "install"],
    "ruff check": ["ruff", "check"],
    "ruff format": ["ruff", "format"],
    "mypy": ["mypy"],
    "tensorboard": ["tensorboard.main"],
}
FOREIGN = {"xcode-select": {"--install"}}
PROGRAMS = re.compile(
    "|".join(map(re.escape, [*OURS, FLOW, *PYTHON_TOOLS, *FOREIGN]))
    + r"|(?<![-\w])(?:deepspeed|torchrun|python)\b"
)
IN_A_FOLDER = r"(?:config|training|notebooks|flows|tests|\.ci)/[\w./-]*\w"
AT_THE_ROOT = r"run_\w+\.sh|requirements\w*\.txt|pyproject\.toml"
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def code(document: Path) -> list[str]:
    """The lines of code of a document: of a script all, of a Markdown file its blocks and its spans."""
    text = document.read_text().replace("\\\n", " ")
    if document.suffix != ".md":
        return text.splitlines()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def click_flags(command: click.Command) -> set[str]:
    return {
        flag
        for each in command.get_params(click.Context(command))
        for flag in (*each.opts, *each.secondary_opts)
    }


@cache
def flags(program: str) -> set[str]:
    """The long options that a program takes, from the program itself."""
    if program in FOREIGN:
        return FOREIGN[program]
    if program in OURS:
        module = ".".join(OURS[program].relative_to(ROOT).with_suffix("").parts)
        taken = click_flags(importlib.import_module(module).main)
        return taken | flags("training.trainer") if "demo" in program else taken  # it hands options on
    if program == FLOW:
        user = os.environ | {"METAFLOW_USER": "tester"}
        told = [python(FLOW, *command, "--help", env=user) for command in ([], ["run"], ["resume"])]
        text = "".join(each.stdout + each.stderr for each in told)  # Metaflow speaks by the second
        return set(OPTION.findall(text)) | flags("training.trainer")  # it hands options on
    if program == "deepspeed":
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            runner.parse_args(["--help"])
        return set(OPTION.findall(text.getvalue()))
    if program == "torchrun":
        return set(OPTION.findall(torch.distributed.run.get_args_parser().format_help()))
    tool = ["-m", *PYTHON_TOOLS[program]] if program != "python" else []
    # Not here: pytest would load these tests for its help.
    result = python(*tool, "--help", cwd="/")
    assert result.returncode == 0, f"{program}: {result.stderr}"
    return set(OPTION.findall(result.stdout))


def options_by_program(line: str) -> list[tuple[str, str]]:
    """(program, option) of a line of code; the program is "" where the line names none.

    "deepspeed --num_gpus 2 --module training.trainer --lr 1" gives
    [("deepspeed", "--num_gpus"), ("deepspeed", "--module"), ("training.trainer", "--lr")]
    """
    found, program, end = [], "", 0
    for match in [*PROGRAMS.finditer(line), None]:
        part = line[end : match.start() if match else len(line)]
        found += [(program, option) for option in OPTION.findall(part)]
        if match:
            program, end = match.group(), match.end()
    return found


@EACH_DOCUMENT
def test_every_option_module_and_file_of_the_repository_that_is_named_exists(document: Path) -> None:
    for line in code(document):
        for program, option in options_by_program(line):
            known = flags(program) if program else set.union(*map(flags, [*OURS, FLOW]))
            assert option in known, f"{program or 'no command of ours'} has no {option}, named in: {line}"
        for module in re.findall(r"(?<!\S)(?:-m|--module)\s+([a-zA-Z_][\w.]*)", line):
            assert importlib.util.find_spec(module), f"no module {module}, named in: {line}"
        for name in re.findall(rf"(?<![\w/.-])(?:\./)?({IN_A_FOLDER}|{AT_THE_ROOT})", line):
            there = (ROOT / name).exists() if "/" in name else (ROOT / name).is_file()
            assert there, f"no {name}, named in: {line}"


def test_every_line_of_the_readmes_tree_names_a_file_and_every_link_inside_the_repository_leads_somewhere() -> (
    None
):
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target.split("#")[0]).exists(), target
    [block] = re.findall(r"^```\n(README.*?)^```", README, re.DOTALL | re.MULTILINE)
    folder = ROOT
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not indent:
            folder = ROOT / name if name.endswith("/") else ROOT
            names = line.split() if name == "README.md" else [name]
        else:
            names = [f"{folder.name}/{name}"]
        for each in names:
            assert (ROOT / each).exists(), f"no {each}"


def test_what_the_readmes_python_imports_from_us_exists_and_takes_those_arguments() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def stretches(text: str) -> list[str]:
    """The words of a text without punctuation at their ends, cut where a message fills something in: a number, its
    unit, an option, whatever stands for "..."."""
    text = text.replace("...", " 0 ")
    words = (word.strip("`\"'.,:;()[]") for word in text.split())
    kept = " ".join("\0" if re.search(r"\d|GiB|^--", word) else word for word in words if word)
    return [part for each in kept.split("\0") if (part := each.strip())]


def test_the_messages_of_the_readme_are_those_of_the_code() -> None:
    """What stands between two fillings is in one string of training/, or in two where one is filled into the other."""
    strings = []
    for file in (ROOT / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else " 0 " for p in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    known = "\n".join(part for each in strings for part in stretches(each))
    [section] = re.findall(r"^## When something goes wrong\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 15
    for message in messages:
        for words in map(str.split, stretches(message)):
            cuts = [(" ".join(words[:n]), " ".join(words[n:])) for n in range(len(words))]
            assert any(first in known and second in known for first, second in cuts), (message, words)


def test_the_scripts_can_be_run() -> None:
    for script in SCRIPTS:
        if script.parent.name != "config":  # those are sourced
            assert script.stat().st_mode & 0o111, f"chmod +x {script.name}"
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script.name


def test_the_readmes_trainer_commands_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed by the trainer's own command line, with an output of this test."""
    taken = []
    finished = {"status": "finished"}
    monkeypatch.setattr(trainer, "train", lambda options, request: taken.append(options) or finished)
    commands = re.findall(r"training\.trainer\s+(--(?!help).*)", "\n".join(code(ROOT / "README.md")))
    assert commands
    for line in commands:
        with pytest.raises(SystemExit) as ended:
            trainer.main([*line.split(), "--local-output-dir", str(tmp_path / "out")])
        assert ended.value.code == 0, line
    assert len(taken) == len(commands)
