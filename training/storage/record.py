"""run.json, the record of a run: its options, status and results."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.consts import RUN_FILE
from training.errors import UnfinishedRunError
from training.files import write_json
from training.storage.checkpoint import export_advice


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record atomically, so that a reader never sees half of it."""
    write_json(folder / RUN_FILE, record)


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run in any state; None if it is missing or unreadable."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads((folder / RUN_FILE).read_text())
        if isinstance(record, dict) and isinstance(record.get("options"), dict) and "status" in record:
            return record
    return None


def finished_run(folder: Path) -> dict[str, Any]:
    """The record of a finished run. Raises UnfinishedRunError if the folder holds no finished run."""
    try:
        record = json.loads((folder / RUN_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnfinishedRunError(
            f"{folder}: there is no {RUN_FILE}, so no run wrote its model here. "
            "Name a run's --local-output-dir, or a copy of it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnfinishedRunError(
            f"{folder / RUN_FILE}: cannot be read ({error}). Copy or train the model again"
        ) from error
    if not isinstance(record, dict) or record.get("status") != "finished":
        raise UnfinishedRunError(
            f"{folder}: its training did not finish. Type its training command again, with --resume auto."
            f"{export_advice(folder)}"
        )
    return record
