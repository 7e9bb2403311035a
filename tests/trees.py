"""Copies the product and edits one file of the copy, to test that a change needs only that edit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def edited_copy(folder: Path, file: str, *edits: tuple[str, str]) -> Path:
    """Copies training/ and config/ into `folder` and replaces texts in one file. Each text must occur once."""
    for part in ("training", "config"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder)
    text = (folder / file).read_text()
    for before, after in edits:
        assert text.count(before) == 1, f"{before!r} occurs {text.count(before)} times in {file}"
        text = text.replace(before, after)
    (folder / file).write_text(text)
    return folder


def run_in(tree: Path, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of the copy, with stderr merged into stdout."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
