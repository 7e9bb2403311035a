"""Reads the rows of several sources, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from training.data.columns import Columns
from training.data.held_out import source_of_each
from training.data.rows import read_columns, selection_of

if TYPE_CHECKING:
    import datasets

# Columns with a value for each row, and the value where a source has no such column.
PER_ROW: dict[str, Any] = {"instruction": "", "input": "", "output": "", "category": "", "history": ()}


def read_sources(
    sources: Sequence[str], selection: Mapping[str, str] | None = None
) -> tuple[Columns, list[int]]:
    """(columns of all sources in this order, the place of each source's first row). Raises DataError."""
    parts = [read_columns(source, selection_of(source, sources, selection or {})) for source in sources]
    if len(parts) == 1:
        return parts[0], [0]
    columns = Columns([], [], [])
    for name in PER_ROW:
        if any(getattr(part, name) for part in parts):
            values = [getattr(part, name) or [PER_ROW[name]] * len(part) for part in parts]
            setattr(columns, name, list(chain.from_iterable(values)))
    return columns, [0, *accumulate(map(len, parts))][:-1]


def places_of(rows: datasets.Dataset, starts: Sequence[int]) -> list[int]:
    """The place of each tokenised row in the columns of `read_sources`, from 0."""
    return [
        starts[source] + row - 1 for source, row in zip(source_of_each(rows), rows["row"][:], strict=True)
    ]
