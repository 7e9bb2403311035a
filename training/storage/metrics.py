"""Metrics and sample answers, written while a run trains, one JSON object a line; notebook, flow and other tools read them.

metrics.jsonl   {"step": 10, "max_steps": 797, "epoch": 0.013, "seconds": 12.3, "loss": 1.9, "learning_rate": 1e-05,
                 "grad_norm": 2.1, "tokens_per_second": 9000.0, "real_token_share": 1.0, "mfu": 0.4, ...}
                {"step": 100, "max_steps": 797, "epoch": 0.126, "seconds": 80.1, "eval_loss": 1.5}
samples.jsonl   {"step": 100, "epoch": 0.126, "instruction": "Name a river.", "input": "", "response": "The Rhine"}

`seconds` are those of training, those before a resume included; a number that is NaN or infinite (the gradient of an
fp16 step that was skipped) is null. Rank 0 appends; a run that goes on from a checkpoint first removes what came after
it, so no step stands twice."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from training.files import write_file

logger = logging.getLogger(__name__)


def append(file: Path, *entries: dict[str, Any]) -> bool:
    """Adds lines in one write, so that a reader sees whole lines, except for a torn last one.

    A full disk does not end the run: a warning is logged, and False is returned.
    """
    try:
        with open(file, "ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a torn line must not spoil this one
                    stream.write(b"\n")
            stream.write("".join(map(_line, entries)).encode())
    except OSError as error:
        logger.warning("%s could not be written (%s); the run goes on without it", file, error.strerror)
        return False
    return True


def _line(entry: dict[str, Any]) -> str:
    """An entry as JSON, which has no NaN: a browser's parser would stop there."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }
    return json.dumps(plain, ensure_ascii=False) + "\n"


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a file, in order; none where there is no file. A line that a killed run left torn is skipped."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    entries = []
    for line in text.split("\n"):  # not splitlines: U+2028 may stand inside a string
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def forget_after(file: Path, step: int, former: Path | None = None) -> None:
    """Keeps the entries up to `step`; a run that goes on from there writes the later ones again.

    The entries are those of `former`, where the run goes on from another folder's checkpoint. Raises OSError.
    """
    kept = [entry for entry in read(former or file) if entry["step"] <= step]
    content = "".join(map(_line, kept)).encode()
    if content != (file.read_bytes() if file.exists() else b""):
        write_file(file, content)
