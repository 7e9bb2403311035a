"""Layout of the code: packages import only lower ones; files and functions are short."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("training", "flows", "notebooks")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
# Packages ("rooms") that each package may import besides itself. Commands, flows and notebooks may import all.
BASE_MODULES = {"consts", "console", "errors", "files", "ranks", "pictures"}
ALLOWED_IMPORTS = {
    **dict.fromkeys(BASE_MODULES, BASE_MODULES),
    **dict.fromkeys(("data", "options", "machine", "storage"), BASE_MODULES),
    "model": BASE_MODULES | {"data", "storage"},
    "launch": BASE_MODULES | {"options", "machine", "storage"},
    "plan": BASE_MODULES | {"data", "options", "machine", "model"},
    "tracking": BASE_MODULES | {"data", "options", "storage", "model"},
    "evaluate": BASE_MODULES | {"data", "storage", "model"},
    "run": BASE_MODULES
    | {"data", "options", "machine", "storage", "model", "launch", "plan", "tracking", "evaluate"},
}
COMMANDS = {
    "trainer",
    "generate",
    "publish",
    "demo",
    "export",
    "notebook",
    "bench",
    "page",
    "plan.__main__",
    "tracking.__main__",
    "evaluate.__main__",
}
MAX_LEVELS = 7


@cache
def imports(module: str, typing_only: bool = True) -> frozenset[str]:
    """Our modules imported anywhere in a module; with `typing_only` False without those under TYPE_CHECKING."""
    tree, names, skipped = ast.parse(FILES[module].read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing_only:
            skipped |= set(ast.walk(node))
        if isinstance(node, ast.Import):
            imported = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        else:
            continue
        names |= imported if node not in skipped else set()
    packages = {name for name in names if name in FILES and FILES[name].name == "__init__.py"}
    return frozenset(name for name in names - packages if name in FILES and name != module)


def room(module: str) -> str:
    return module.split(".")[1]


def test_a_package_imports_only_packages_below_it() -> None:
    wrong = []
    for module in FILES:
        inner = module.removeprefix("training.")
        if inner == module or inner in COMMANDS or room(module) in COMMANDS:
            continue  # they may import everything
        assert room(module) in ALLOWED_IMPORTS, f"{inner} is missing in the import rule"
        allowed = ALLOWED_IMPORTS[room(module)] | {room(module)}
        wrong += [f"{inner} imports {name}" for name in imports(module) if room(name) not in allowed]
    assert not wrong


def test_imports_have_at_most_seven_levels_and_no_cycle() -> None:
    levels: dict[str, int] = {}

    def level(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"an import cycle: {' -> '.join([*above, module])}"
        if module not in levels:
            below = (level(name, (*above, module)) for name in imports(module, typing_only=False))
            levels[module] = 1 + max(below, default=0)
        return levels[module]

    heights = {module: level(module) for module in FILES if module.startswith("training")}
    assert max(heights.values()) <= MAX_LEVELS, {m: n for m, n in heights.items() if n > MAX_LEVELS}


def test_files_and_functions_are_short() -> None:
    too_long = []
    for module, file in FILES.items():
        text = file.read_text()
        lines = len(text.splitlines())
        # gpu_profile.py is one file, so that it can be copied next to any flow
        if lines > (150 if module == "training.trainer" else 400) and file.name != "gpu_profile.py":
            too_long.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if node.end_lineno - start >= 60:
                    too_long.append(f"{module}.{node.name}: {node.end_lineno - start + 1} lines")
    for file in (ROOT / "tests").rglob("*.py"):
        if (lines := len(file.read_text().splitlines())) > 600:
            too_long.append(f"{file.relative_to(ROOT)}: {lines} lines")
    assert not too_long


def test_consts_imports_none_of_our_modules() -> None:
    tree = ast.parse(FILES["training.consts"].read_text())
    allowed = {"__future__", "pathlib", "typing"}
    assert {node.module for node in tree.body if isinstance(node, ast.ImportFrom)} <= allowed
    assert not any(isinstance(node, ast.Import) for node in tree.body)


def test_no_rank_of_the_tests_imports_conftest_which_clears_the_variables_of_its_launcher() -> None:
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in (ROOT / "tests").rglob("*.py")
    }
    imported = {
        module: {
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if name in files
        }
        for module, file in files.items()
    }
    ranks = {module for module, file in files.items() if "\n    run_and_exit(" in file.read_text()}
    assert "tests.run.zero3_gradients" in ranks
    for rank in ranks:
        reached, new = set[str](), {rank}
        while new:
            reached |= new
            new = {name for module in new for name in imported[module]} - reached
        assert "tests.conftest" not in reached, rank
