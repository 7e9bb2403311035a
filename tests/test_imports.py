"""The import rule of the architecture: a module imports only what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "consts",
    "metrics",
    "exits",
    "supervisor",
    "checks",
    "demo",
    "rows",
    "data",
    "batching",
    "collator",
    "loss",
    "attention",
    "machines",
    "flops",
    "model",
    "publish",
    "options",
    "faults",
    "launch",
    "spark",
    "operators",
    "settings",
    "workload",
    "memory",
    "timing",
    "verdict",
    "picture",
    "checkpoint",
    "record",
    "resume",
    "stopping",
    "finished",
    "callbacks",
    "loop",
    "generate",
    "samples",
    "served",
    "tracking",
    "plan",
    "bench",
    "notebook",
]
MAY_IMPORT_ALL = {"trainer", "demo.__main__"}
FILES = sorted((ROOT / "training").rglob("*.py"))


def module_of(file: Path) -> str:
    """training/demo/tasks.py -> "demo.tasks"; training/demo/__init__.py -> "demo"."""
    return ".".join(file.relative_to(ROOT / "training").with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path) -> list[str]:
    """Absolute names of all that a file imports, wherever in it, relative imports resolved."""
    package = list(file.relative_to(ROOT).parent.parts)
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from training import data` names a module; `from training.data import X` does not.
            names += [f"{base}.{alias.name}" for alias in node.names] if base == "training" else [base]
    return names


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_module_imports_only_what_stands_above_it(file: Path) -> None:
    module = module_of(file)
    if module == "__init__" or module in MAY_IMPORT_ALL:
        return
    room = module.split(".")[0]
    assert room in ORDER, f"{file.name} has no place in the order of the architecture"
    for name in imported(file):
        if name.split(".")[0] != "training":
            continue
        other = name.split(".")[1]
        assert other == room or other in ORDER[: ORDER.index(room)], f"{module} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_training_imports_no_notebook_no_flow_and_no_test(file: Path) -> None:
    assert not {name.split(".")[0] for name in imported(file)} & {"notebooks", "flows", "tests"}


def test_the_words_and_defaults_import_nothing() -> None:
    assert imported(ROOT / "training" / "consts.py") == []
