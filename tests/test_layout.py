"""The layout of the code: rooms that import only what lies below them, short files, short functions."""

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
# A room imports the rooms named here, and itself. Commands, flows and notebooks import any.
GROUND = {"consts", "errors", "files", "ranks", "pictures"}
BELOW = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(("data", "options", "machine", "storage"), GROUND),
    "model": GROUND | {"data", "storage"},
    "launch": GROUND | {"options", "storage"},
    "plan": GROUND | {"data", "options", "machine", "model"},
    "tracking": GROUND | {"data", "options", "storage", "model"},
    "run": GROUND | {"data", "options", "machine", "storage", "model", "launch", "plan", "tracking"},
}
COMMANDS = {
    "trainer",
    "generate",
    "publish",
    "demo",
    "notebook",
    "bench",
    "plan.__main__",
    "tracking.__main__",
}
LEVELS = 7


@cache
def imports(module: str, typing_only: bool = True) -> frozenset[str]:
    """Our modules that a module imports, wherever in it; without those that only a type checker sees, if not wanted."""
    tree, names, skipped = ast.parse(FILES[module].read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing_only:
            skipped |= set(ast.walk(node))
        if isinstance(node, ast.Import):
            found = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        else:
            continue
        names |= found if node not in skipped else set()
    packages = {name for name in names if name in FILES and FILES[name].name == "__init__.py"}
    return frozenset(name for name in names - packages if name in FILES and name != module)


def room(module: str) -> str:
    return module.split(".")[1]


def test_a_room_imports_only_rooms_below_it() -> None:
    wrong = []
    for module in FILES:
        inner = module.removeprefix("training.")
        if inner == module or inner in COMMANDS or room(module) in COMMANDS:
            continue  # flows, notebooks and commands import any room
        assert room(module) in BELOW, f"{inner} has no place in the import rule"
        allowed = BELOW[room(module)] | {room(module)}
        wrong += [f"{inner} imports {name}" for name in imports(module) if room(name) not in allowed]
    assert not wrong


def test_files_stand_on_at_most_seven_levels_without_a_circle() -> None:
    levels: dict[str, int] = {}

    def level(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a circle of imports: {' -> '.join([*above, module])}"
        if module not in levels:
            below = (level(name, (*above, module)) for name in imports(module, typing_only=False))
            levels[module] = 1 + max(below, default=0)
        return levels[module]

    heights = {module: level(module) for module in FILES if module.startswith("training")}
    assert max(heights.values()) <= LEVELS, {m: n for m, n in heights.items() if n > LEVELS}


def test_files_and_functions_are_short() -> None:
    too_long = []
    for module, file in FILES.items():
        text = file.read_text()
        lines = len(text.splitlines())
        # laid beside anyone's flow, gpu_profile.py is one file on purpose
        if lines > (150 if module == "training.trainer" else 400) and file.name != "gpu_profile.py":
            too_long.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                begin = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                if node.end_lineno - begin >= 60:
                    too_long.append(f"{module}.{node.name}: {node.end_lineno - begin + 1} lines")
    for file in (ROOT / "tests").rglob("*.py"):
        if (lines := len(file.read_text().splitlines())) > 600:
            too_long.append(f"{file.relative_to(ROOT)}: {lines} lines")
    assert not too_long


def test_the_defaults_import_nothing() -> None:
    tree = ast.parse(FILES["training.consts"].read_text())
    allowed = {"__future__", "pathlib", "typing"}
    assert {node.module for node in tree.body if isinstance(node, ast.ImportFrom)} <= allowed
    assert not any(isinstance(node, ast.Import) for node in tree.body)
