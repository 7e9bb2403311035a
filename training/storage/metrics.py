"""Metrics and sample answers written while a run trains, one JSON object per line, for notebook, flow and other tools.

metrics.jsonl   {"step": 10, "max_steps": 797, "epoch": 0.013, "seconds": 12.3, "loss": 1.9, "learning_rate": 1e-05,
                 "grad_norm": 2.1, "tokens_per_second": 9000.0, "real_token_share": 1.0, "mfu": 0.4, ...}
                {"step": 100, "max_steps": 797, "epoch": 0.126, "seconds": 80.1, "eval_loss": 1.5}
                {"step": 200, "max_steps": 797, "epoch": 0.251, "seconds": 99.2, "blocked_seconds": 0.3,
                 "written_bytes": 85000000000}
                With several sources, a held-out loss of each follows: "eval_loss_alpaca": 1.4, "eval_loss_dolly": 1.7.
samples.jsonl   {"step": 100, "epoch": 0.126, "instruction": "Name a river.", "input": "", "response": "The Rhine"}
                with "history", a list of messages, before the response if the prompt follows a conversation

The line of a save follows when its last file is written, some steps later. `seconds` count training time, including
the time before a resume. NaN and infinity (the gradient norm of a skipped
fp16 step) are written as null. Only rank 0 writes. A resumed run first drops the entries after its checkpoint, so no
step appears twice."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from training.consts import SOURCE_LOSS
from training.files import write_file

logger = logging.getLogger(__name__)


def losses_by_source(entry: dict[str, Any]) -> dict[str, float]:
    """The held-out loss of each source by its label, from an entry of the log; {} if there is one source."""
    return {
        name.removeprefix(SOURCE_LOSS): loss for name, loss in entry.items() if name.startswith(SOURCE_LOSS)
    }


def append(file: Path, *entries: dict[str, Any]) -> bool:
    """Appends lines in one write. Only the last line of the file can be incomplete.

    If the file cannot be written, logs a warning and returns False: a full disk must not end the run here.
    """
    try:
        with open(file, "ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # end an incomplete last line first
                    stream.write(b"\n")
            stream.write("".join(map(_line, entries)).encode())
    except OSError as error:
        logger.warning("%s could not be written (%s); the run continues without it", file, error.strerror)
        return False
    return True


def _line(entry: dict[str, Any]) -> str:
    """An entry as strict JSON: NaN and infinity become null, as browsers cannot parse them."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }
    return json.dumps(plain, ensure_ascii=False) + "\n"


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a file, in order; [] if it does not exist. Incomplete lines of a killed run are skipped."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    entries = []
    for line in text.split("\n"):  # not splitlines: U+2028 is legal inside a string
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def saves_of(file: Path) -> dict[str, float]:
    """The saves of a run in sum: {"count", "blocked_seconds", "written_bytes"}."""
    saves = [entry for entry in read(file) if "blocked_seconds" in entry]
    figures = {name: sum(save[name] for save in saves) for name in ("blocked_seconds", "written_bytes")}
    return {"count": len(saves)} | figures


def drop_entries_after(file: Path, step: int, source: Path | None = None) -> None:
    """Drops the entries after `step`, which a resumed run writes again.

    `source` is the file to take the entries from if the run resumes from another folder. Raises OSError.
    """
    kept = [entry for entry in read(source or file) if entry["step"] <= step]
    content = "".join(map(_line, kept)).encode()
    if content != (file.read_bytes() if file.exists() else b""):
        write_file(file, content)
