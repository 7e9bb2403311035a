"""Names of the sources of a run's rows: one or several values of `--training-dataset`. No source is read."""

from __future__ import annotations

from collections.abc import Sequence


def sources_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """The sources that a run's record names: a list, or one string in records of earlier versions."""
    return (value,) if isinstance(value, str) else tuple(value)


def joined(value: str | Sequence[str]) -> str:
    """The sources as one text, for tables and trackers."""
    return ", ".join(sources_of(value))
