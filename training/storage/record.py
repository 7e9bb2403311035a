"""run.json: what a run was asked and what it has become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.consts import RUN_FILE
from training.files import write_json


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record in one rename, so that a reader never sees half of one."""
    write_json(folder / RUN_FILE, record)


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run's folder, or None where there is none that can be read."""
    try:
        record = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("options"), dict) and "status" in record
    return record if known else None
