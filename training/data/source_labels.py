"""Short names of the sources of a run, for its metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from training.consts import KINDS
from training.data.table import COMPRESSED

LONGEST_LABEL = 40  # characters


def source_labels(sources: Sequence[str]) -> list[str]:
    """A short name for each source, of letters, digits, "_", "." and "-": that of its file, folder or dataset.

    Where two would be equal, the name of the folder or owner comes before it, and if they still are, a number behind it.

        data/alpaca.jsonl, a/train.json, b/train.json, databricks/dolly  ->  alpaca, a-train, b-train, dolly
    """
    paths = [PurePath(source) for source in sources]
    labels = [_label(_without_kind(path.name)) for path in paths]
    lower = [
        label.lower() for label in labels
    ]  # a tracker may write files, on a disk that takes no notice of case
    for place, path in enumerate(paths):
        if lower.count(lower[place]) > 1 and path.parent.name:
            labels[place] = _label(f"{path.parent.name}-{_without_kind(path.name)}")
    taken: set[str] = set()
    for place, label in enumerate(labels):
        number = 1
        while labels[place].lower() in taken:
            number += 1
            labels[place] = f"{label}-{number}"
        taken.add(labels[place].lower())
    return labels


def _without_kind(name: str) -> str:
    """The name of a file without the endings that say its kind: "rows" of rows.jsonl.gz."""
    while (end := PurePath(name).suffix).lower() in (*KINDS, *COMPRESSED):
        name = name.removesuffix(end)
    return name


def _label(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:LONGEST_LABEL] or "rows"
