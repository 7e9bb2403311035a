"""How the processes that tests start begin. Ranks of tests import this, and not conftest.py, which clears their variables."""

from __future__ import annotations

import os
from pathlib import Path

LIGHT = str(Path(__file__).with_name("light"))  # first on PYTHONPATH


def changed_start(folder: Path, code: str) -> dict[str, str]:
    """The variable with which processes run `code` before their program, and see neither MLflow nor bitsandbytes."""
    (folder / "sitecustomize.py").write_text((Path(LIGHT) / "sitecustomize.py").read_text() + code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])])}
