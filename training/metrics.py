"""What a run tells while it trains, one JSON object a line, for who looks on: notebook, flow, and people's own tools.

metrics.jsonl   {"step": 10, "max_steps": 797, "epoch": 0.013, "seconds": 12.3, "loss": 1.9, "learning_rate": 1e-05,
                 "grad_norm": 2.1, "tokens_per_second": 9000.0, "real_token_share": 1.0, "mfu": 0.4, ...}
                {"step": 100, "max_steps": 797, "epoch": 0.126, "seconds": 80.1, "eval_loss": 1.5}
samples.jsonl   {"step": 100, "epoch": 0.126, "instruction": "Name a river.", "input": "", "response": "The Rhine"}

`seconds` are those of training, those before a resume included. Rank 0 appends; a run that goes on from a checkpoint
first removes what came after it, so no step stands twice. Imports Python's own library alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


def append(file: Path, entry: dict[str, Any]) -> None:
    """Adds one line, in one write, so that who reads meanwhile sees whole lines but for a torn last one."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a file, in order; none where there is no file. A last line that a killed run tore is left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries


def forget_after(file: Path, step: int) -> None:
    """Removes the entries of steps after `step`, which a run that goes on from there will write again."""
    if not file.exists():
        return
    partial = file.with_name(f"{file.name}.partial")
    kept = [json.dumps(entry) + "\n" for entry in read(file) if entry["step"] <= step]
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, file)
