"""README, docs and scripts agree with the code: commands, options, files, links, messages and figures."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path

import click
import pytest
import torch.distributed.run
from click.testing import CliRunner
from deepspeed.launcher import runner

from tests.conftest import python
from tests.test_layout import ALLOWED_IMPORTS, BASE_MODULES
from training import trainer
from training.launch.exits import exit_meaning
from training.machine.catalogue import FAMILIES, GPUS, MACHINES, usable_host_gib
from training.model.generation import PARAMETERS
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main as plan_command
from training.plan.timing import CPU_RANGE, GPU_RANGE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
PAGES = [README, *DOCS.values()]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run", *sorted((ROOT / "config").glob("*.sh"))]
DOCUMENTS = [*PAGES, *SCRIPTS]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
EACH_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

# Programs that the docs may run, by the name used there. Our modules that have a command:
OURS = {
    "training."
    + file.relative_to(ROOT / "training")
    .with_suffix("")
    .as_posix()
    .removesuffix("/__main__")
    .replace("/", "."): file
    for file in (ROOT / "training").rglob("*.py")
    if "\ndef main(" in file.read_text()
}
OURS["run_demo.sh"] = OURS["training.demo"]
OURS["tests.soak"] = ROOT / "tests" / "soak.py"
# The flow, whose command line is Metaflow's:
FLOW = "flows/train_dolly_flow.py"
OURS["flows/model_on_s3.py"] = ROOT / "flows" / "model_on_s3.py"
# Python's tools, and programs whose options cannot be read here:
PYTHON_TOOLS = {
    "run_pytest.sh": ["pytest"],  # passes its arguments on
    "pytest": ["pytest"],
    "pip install": ["pip", "install"],
    "pip wheel": ["pip", "wheel"],
    "pip download": ["pip", "download"],
    "ruff check": ["ruff", "check"],
    "ruff format": ["ruff", "format"],
    "mypy": ["mypy"],
    "tensorboard": ["tensorboard.main"],
}
FOREIGN = {
    "xcode-select": {"--install"},
    "uv venv": {"--python", "--quiet"},
    "apt-get install": {"--no-install-recommends"},
    "databricks bundle": {"--target", "--var"},
    "databricks air run": {"--file"},
    "docker build": {"--target"},
    "docker run": {"--gpus", "--ipc"},
}
PROGRAMS = re.compile(
    "|".join(map(re.escape, sorted([*OURS, FLOW, *PYTHON_TOOLS, *FOREIGN], key=len, reverse=True)))
    + r"|(?<![-\w])(?:deepspeed|torchrun|python)\b"
)
IN_A_FOLDER = r"(?:config|training|notebooks|flows|tests|docs|\.ci)/[\w./-]*\w"
AT_THE_ROOT = r"run_\w+\.sh|requirements\w*\.txt|pyproject\.toml"
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def code(document: Path) -> list[str]:
    """The lines of code of a document: all lines of a script, code blocks and code spans of a Markdown file."""
    text = document.read_text().replace("\\\n", " ")
    if document.suffix != ".md":
        return text.splitlines()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def click_flags(command: click.Command) -> set[str]:
    return {
        flag
        for parameter in command.get_params(click.Context(command))
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


@cache
def flags(program: str) -> set[str]:
    """The long options of a program, read from the program itself."""
    if program in FOREIGN:  # the image's entry is the trainer
        return FOREIGN[program] | (flags("training.trainer") if program == "docker run" else set())
    if program in OURS:
        module = ".".join(OURS[program].relative_to(ROOT).with_suffix("").parts)
        own = click_flags(importlib.import_module(module).main)
        passes_on = "demo" in program or program == "training.launch"
        return own | flags("training.trainer") if passes_on else own
    if program == FLOW:
        user = os.environ | {"METAFLOW_USER": "tester"}
        results = [python(FLOW, *command, "--help", env=user) for command in ([], ["run"], ["resume"])]
        text = "".join(result.stdout + result.stderr for result in results)  # Metaflow prints to stderr
        return set(OPTION.findall(text)) | flags("training.trainer")  # it passes options on
    if program == "deepspeed":
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            runner.parse_args(["--help"])
        return set(OPTION.findall(printed.getvalue()))
    if program == "torchrun":
        return set(OPTION.findall(torch.distributed.run.get_args_parser().format_help()))
    tool = ["-m", *PYTHON_TOOLS[program]] if program != "python" else []
    # In another folder: here pytest would load our conftest for its help.
    result = python(*tool, "--help", cwd="/")
    assert result.returncode == 0, f"{program}: {result.stderr}"
    return set(OPTION.findall(result.stdout))


def options_by_program(line: str) -> list[tuple[str, str]]:
    """(program, option) pairs of a line of code; the program is "" if the line names none.

    "deepspeed --num_gpus 2 --module training.trainer --lr 1" gives
    [("deepspeed", "--num_gpus"), ("deepspeed", "--module"), ("training.trainer", "--lr")]
    """
    pairs, program, end = [], "", 0
    for match in [*PROGRAMS.finditer(line), None]:
        part = line[end : match.start() if match else len(line)]
        pairs += [(program, option) for option in OPTION.findall(part)]
        if match:
            program, end = match.group(), match.end()
    return pairs


@EACH_DOCUMENT
def test_every_named_option_module_and_file_exists(document: Path) -> None:
    for line in code(document):
        for program, option in options_by_program(line):
            known = flags(program) if program else set.union(*map(flags, [*OURS, FLOW]))
            assert option in known, f"{program or 'no command of ours'} has no {option}, named in: {line}"
        if "pytest" not in line:  # its -m selects markers
            for module in re.findall(r"(?<!\S)(?:-m|--module)\s+([a-zA-Z_][\w.]*)", line):
                assert importlib.util.find_spec(module), f"no module {module}, named in: {line}"
        for name in re.findall(rf"(?<![\w/.-])(?:\./)?({IN_A_FOLDER}|{AT_THE_ROOT})", line):
            existing = (ROOT / name).exists() if "/" in name else (ROOT / name).is_file()
            assert existing, f"no {name}, named in: {line}"


def test_the_markers_and_extras_of_the_pages_are_those_of_pyproject() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = "\n".join(line for document in DOCUMENTS for line in code(document))
    markers = {marker.split(":")[0] for marker in config["tool"]["pytest"]["ini_options"]["markers"]}
    named = " ".join(re.findall(r"run_pytest\.sh\s+-m\s+(\"[\w ]+\"|\w+)", lines))
    assert set(re.findall(r"\w+", named)) - {"or", "and", "not"} <= markers
    extras = config["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", lines)) == extras.keys() - {"trl"}
    assert extras["trl"][0] in lines


# --- the pages ---------------------------------------------------------------------------------------


@EACH_PAGE
def test_a_page_is_short_and_its_links_work(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 200
    assert page != README or len(text.split()) <= 1200
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_in_the_index_and_the_pictures_are_small() -> None:
    index = README.read_text().split("\n## Documentation\n")[1]
    assert sorted(re.findall(r"^\| \[([\w-]+)\.md\]", index, re.MULTILINE)) == list(DOCS)
    pictures = [file for file in (ROOT / "docs").iterdir() if file.suffix != ".md"]
    assert {file.name for file in pictures} == {"demo.png", "page.png"}
    assert all(file.stat().st_size <= 150_000 for file in pictures)


def test_every_room_of_the_readme_is_a_folder() -> None:
    [block] = re.findall(r"^```\n(config/.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [re.match(r"( *)(\S+)/ ", line).groups() for line in block.splitlines()]
    rooms = {f"training/{name}" if indent else name for indent, name in lines}
    packages = {init.parent for init in (ROOT / "training").rglob("__init__.py")}
    top = {path.parent for name in ("*/*.py", "*/*.json", "*/*.md") for path in ROOT.glob(name)}
    tops = {path for path in top if not path.name.startswith(".")}
    assert rooms == {path.relative_to(ROOT).as_posix() for path in packages | tops}


def test_the_tree_of_the_architecture_names_every_file_of_every_room() -> None:
    text = DOCS["architecture"].read_text()
    rows = dict(re.findall(r"^\| `([\w/]+/)` \| (`.*) \|$", text, re.MULTILINE))
    product = {"training", "flows", "notebooks", "config"}
    for room, cell in rows.items():
        named = [re.match(r"`([\w.]+)` \S", entry) for entry in cell.split(" · ")]
        assert all(named), cell
        files = {file.name for file in (ROOT / room).iterdir() if file.is_file()} - {"__init__.py"}
        assert [match[1] for match in named if match] == list(
            dict.fromkeys(match[1] for match in named if match)
        )
        assert {match[1] for match in named if match} == files, room
    folders = {
        file.parent for name in product for file in (ROOT / name).rglob("*.*") if file.suffix != ".pyc"
    }
    assert rows.keys() == {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


def test_the_import_rule_of_the_architecture_is_the_tested_one() -> None:
    [rule] = re.findall(
        r"^```text\n(consts .*?)^```", DOCS["architecture"].read_text(), re.DOTALL | re.MULTILINE
    )
    assert set(rule.splitlines()[0].split()) == BASE_MODULES
    for room, below in re.findall(r"(\w+) \(([\w, ]+)\)", rule):
        assert room == "storage" or set(below.split(", ")) == ALLOWED_IMPORTS[room] - BASE_MODULES
    ground, *above = (set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", line))) for line in rule.splitlines())
    assert set().union(*above) >= ALLOWED_IMPORTS.keys() - ground


# --- Python and messages -----------------------------------------------------------------------------


@EACH_PAGE
def test_the_python_of_a_page_imports_existing_names_with_valid_arguments(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        imported = {}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training"):
                module = importlib.import_module(node.module)
                imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
                signature = inspect.signature(imported[node.func.id])
                signature.bind(*node.args, **{str(keyword.arg): None for keyword in node.keywords})


def fixed_parts(text: str) -> list[str]:
    """The parts of a message without variable content, such as numbers, units, options and "...".

    Words lose the punctuation at their ends.
    """
    text = text.replace("...", " 0 ")
    words = (word.strip("`\"'.,:;()[]") for word in text.split())
    kept = " ".join("\0" if re.search(r"\d|GiB|^--|%[sd]", word) else word for word in words if word)
    return [stripped for part in kept.split("\0") if (stripped := part.strip())]


def test_the_messages_of_the_docs_are_those_of_the_code() -> None:
    """Each fixed part is in one string of training/, or is the end of one followed by the start of another."""
    strings = []
    for file in (ROOT / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else " 0 " for p in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    known = {f" {part} " for string in strings for part in fixed_parts(string)}
    section = DOCS["errors"].read_text().split("\n## Messages\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 15
    for message in messages:
        for part in fixed_parts(message):
            words = part.split()
            cuts = [(f" {' '.join(words[:n])} ", f" {' '.join(words[n:])} ") for n in range(1, len(words))]
            assert any(f" {part} " in text for text in known) or any(
                any(text.endswith(first) for text in known) and any(text.startswith(second) for text in known)
                for first, second in cuts
            ), (message, part)


def test_the_scripts_are_executable_and_have_valid_syntax() -> None:
    for script in SCRIPTS:
        if script.parent.name != "config":  # config/*.sh are sourced
            assert script.stat().st_mode & 0o111, f"chmod +x {script.name}"
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script.name


def test_the_trainer_commands_of_the_pages_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parses each with the trainer's command line and a temporary output folder."""
    parsed = []
    finished = {"status": "finished"}
    monkeypatch.setattr(trainer, "train", lambda options, request: parsed.append(options) or finished)
    lines = "\n".join(line for page in PAGES for line in code(page))
    commands = re.findall(r"training\.trainer\s+(--(?!help).*)", lines)
    assert len(commands) > 10
    for line in commands:
        with pytest.raises(SystemExit) as ended:
            trainer.main([*line.split(), "--local-output-dir", str(tmp_path / "out")])
        assert ended.value.code == 0, line
    assert len(parsed) == len(commands)


# --- figures -----------------------------------------------------------------------------------------


def rows_of_table(page: str, heading: str) -> list[list[str]]:
    """The cells of a page's table whose header row starts with `heading`."""
    lines = DOCS[page].read_text() if page in DOCS else README.read_text()
    table = re.search(rf"^\| {re.escape(heading)}.*\n\|[-|]+\n((?:\|.*\n)+)", lines, re.MULTILINE)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_the_readmes_machines_have_the_minutes_and_dollars_of_the_plan() -> None:
    rows = rows_of_table("README", "machine | options")
    assert len(rows) == 6
    for machine, options, minutes, published, dollars in rows:
        name = re.findall(r"`(\w[\w.]+)`", machine)[0]
        method = re.findall(r"--lora \d+", options)
        words = ["--machine", name, "--json", *" ".join(method).split()]
        answer = json.loads(CliRunner().invoke(plan_command, words).stdout)
        assert answer["fits"] is True
        hours = answer["hours"]["expected"]
        assert (int(machine.split("×")[0]), int(minutes)) == (answer["num_gpus"], round(60 * hours)), name
        for option in re.findall(r"--[\w-]+ \S+", options.strip("`")):
            assert option in answer["command"], (name, option)
        launcher = 0 if method else 2  # --num_gpus, --module
        assert answer["command"].count("--") == options.count("--") + launcher + 2, "and no others"
        cost, price = re.fullmatch(r"([\d.]+)(?: N at N|(?: at ([\d.]+)))/h", dollars).groups()
        assert cost == f"{hours * float(price or 1):.2f}", name
        assert not price or f"${price}" in DOCS["evidence"].read_text()
        if published:
            assert f"{int(published) / 60:.2f} [" in DOCS["plan"].read_text()


def test_the_table_of_adapters_is_that_of_the_plan() -> None:
    text = DOCS["lora"].read_text()
    rows = rows_of_table("lora", "GPU | options")
    assert len(rows) >= 10
    for gpu, options, memory, host, minutes in rows:
        name = re.findall(r"`(.*)`", gpu)[0]
        words = ["--machine", name, *options.strip("`").split(), "--json"]
        answer = json.loads(CliRunner().invoke(plan_command, words).stdout)
        assert answer["fits"] is True, name
        sizes = answer["gpu_memory_gib"]
        assert memory == f"{sizes['total']:.1f} of {sizes['available']:.1f}", name
        assert host == f"{answer['host_memory_gib']['total']:.1f}", name
        assert minutes == f"{60 * answer['hours']['expected']:.0f}", name
        for part, shown in (
            ("frozen weights", "in 16 bits: {:.1f} GiB"),
            ("merging", "the process: {:.1f} GiB"),
        ):
            if "nf4" in options:
                assert f"stay in 16 bits: {sizes['frozen weights']:.1f} GiB" in text
            elif answer["num_gpus"] == 1:
                assert shown.format((sizes | answer["host_memory_gib"])[part]) in text
    assert f"wrong by a factor of {GPU_RANGE:g}:" in text


def test_the_docs_state_the_accuracy_of_the_plan() -> None:
    text = " ".join(DOCS["plan"].read_text().split())
    assert f"a factor of {GPU_RANGE:g} on GPUs and of {CPU_RANGE:g} on CPUs" in text
    assert f"by a factor of {GPU_RANGE:g}." in " ".join(README.read_text().split())


def as_several(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_the_defaults_of_the_docs_are_the_options() -> None:
    defaults = {field.name: field.default for field in fields(TrainingOptions)}
    helps = {field.name: field.metadata["help"] for field in fields(TrainingOptions)}
    for _, value, options in rows_of_table("training", "what | default"):
        names = [name.replace("-", "_") for name in re.findall(r"--([\w-]+)", options)]
        if [defaults[name] for name in names] == [None]:  # it depends on the run
            assert f"[default: {value}]" in helps[names[0]]
            continue
        values = value.strip("`").split(", ")
        known = [default for name in names for default in as_several(defaults[name])]
        assert values == [f"{value:g}" if isinstance(value, float) else str(value) for value in known]


def test_the_machines_and_families_of_the_docs_are_those_of_the_catalogue() -> None:
    for family, types in rows_of_table("databricks", "GPU family"):
        assert {MACHINES[name].family for name in re.findall(r"`([\w.-]+)`", types)} == {family.strip("`")}
    for gpus, file in rows_of_table("training", "GPUs | file"):
        for name in re.findall(r"\b[AHV]100?\b", gpus):
            assert FAMILIES[name.lower()].deepspeed == file.strip("`")


def test_the_page_of_machines_is_the_catalogue() -> None:
    links = {"PCIe": "pcie"} | {f"NVLink {number}": f"nvlink{number}" for number in range(2, 6)}
    rows = rows_of_table("machines", "GPU | GiB")
    assert {
        name.strip("`"): (float(memory), 1e12 * float(peak), links[link], family.strip("`"))
        for name, memory, peak, link, family in rows
    } == {name: (gpu.memory_gib, gpu.flops, gpu.link, gpu.family) for name, gpu in GPUS.items()}
    named = {}
    for _, names, gpus, sizes in rows_of_table("machines", "cloud | names"):
        count, gpu = gpus.replace("`", "").split()
        for name, size in zip(re.findall(r"`([\w.-]+)`", names), sizes.split(", "), strict=True):
            named[name] = (int(count), gpu, usable_host_gib(float(size)))
    short = DOCS["machines"].read_text().split("stand for")[1].split("- **Two")[0]
    assert named == {
        name: (machine.count, machine.gpu, machine.host_gib)
        for name, machine in MACHINES.items()
        if f"`{name}`" not in short
    }
    assert {name for name in MACHINES if name[0].isdigit()} == set(re.findall(r"`([\w.-]+)`", short))


def test_the_exit_codes_of_the_docs_match_the_code() -> None:
    rows = rows_of_table("errors", "code | words")
    assert len(rows) >= 10
    for codes, words, _ in rows:
        for number in codes.split(", "):
            assert exit_meaning(int(number)).startswith(words.strip("`")), number


def test_the_parameters_of_the_served_model_are_those_of_the_signature() -> None:
    rows = [
        (name.strip("`"), default) for name, default, _ in rows_of_table("publish", "parameter | default")
    ]
    assert rows == [(name, str(default)) for name, _, default in PARAMETERS]


def test_the_pod_of_the_docs_is_that_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "flows"), *sys.path])
    pod = importlib.import_module("pod")
    text = " ".join(DOCS["metaflow"].read_text().split())
    named = r"`([\w-]+)` asks for (\d+) GPUs, (\d+) CPUs, (\d+) GB of memory, (\d+) GiB of shared .*? (\d+) GB of disk"
    machine, gpus, cpus, memory, shared, disk = re.search(named, text).groups()
    assert pod.resources(machine, {}) == {
        "gpu": int(gpus),
        "cpu": int(cpus),
        "memory": 1000 * int(memory),
        "shared_memory": 1024 * int(shared),
        "disk": 1000 * int(disk),
    }


def test_the_names_of_the_worked_changes_are_in_the_files_beside_them() -> None:
    rows = rows_of_table("architecture", "to change | edit")
    assert len(rows) >= 10
    for _, edit in rows:
        files = re.findall(rf"`({IN_A_FOLDER})`", edit)
        code = "".join((ROOT / file).read_text() for file in files)
        for name in re.findall(r"`(\w+)`", edit):
            assert re.search(rf"^(def |class )?{name}\b", code, re.MULTILINE), f"{name} is not in {files}"
