"""A copy of the product in which one file is edited as text: what one edit changes, and that it needs no second one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def edited_copy(folder: Path, file: str, *edits: tuple[str, str]) -> Path:
    """Copies training/ and config/ into `folder`, and replaces in one file of them each text, which stands there once."""
    for part in ("training", "config"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder)
    text = (folder / file).read_text()
    for before, after in edits:
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {file}"
        text = text.replace(before, after)
    (folder / file).write_text(text)
    return folder


def run_in(tree: Path, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the copy. Its output and its errors come together."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
