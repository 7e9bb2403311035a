"""Rows by column before their meaning is known, and the words of messages about files, rows and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Columns of conversations: OpenAI's, ShareGPT's, and that of lmsys-chat and WildChat.
CONVERSATIONS = ("messages", "conversations", "conversation")
HISTORY = "history"  # a column beside instruction and output: the turns before them
SYSTEM_PROMPT = "system"  # a column: what stands before the first question of a row

FIRST = 10  # rows that a message lists
NAMED = 20  # names of columns or files that a message lists
COMPRESSED = (".gz", ".zst")  # suffixes behind the suffix of the kind


@dataclass
class Table:
    """Rows by column, before their meaning is known.

    Attributes:
        source: the path or name that messages begin with.
        names: names of the columns. Parquet may repeat one.
        count: number of rows.
        values: the values of a column, by name; None for a row without a value. Raises DataError.
        not_read: parts of the file that are not read, such as "the list 'test'".
    """

    source: str
    names: list[str]
    count: int
    values: Callable[[str], list[Any]]
    not_read: list[str] = field(default_factory=list)


class Number(str):
    """A JSON number as it is written in the file: 7, 7.50."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def text_of(value: Any) -> str | None:
    """A string, number or boolean as text, a missing value as ""; None for any other value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"  # as in JSON
    if isinstance(value, Number):
        return str.__str__(value)
    if isinstance(value, int):  # inside a list of Parquet
        return str(value)
    return value if isinstance(value, str) else None


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded, that is, has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short_repr(value: Any) -> str:
    """A value and its type in at most about 50 characters."""
    kind = "number" if isinstance(value, Number) else type(value).__name__
    return f"{kind} {short(repr(value))}"


def short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def and_more(numbers: Sequence[int], noun: str) -> str:
    """Says how many rows or lines have the same fault and lists the first ten. Empty for one."""
    if len(numbers) < 2:
        return ""
    first = ", ".join(map(str, numbers[:FIRST]))
    return f". {len(numbers):,} {noun} are like this; the first: {first}"


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Names in quotes, long ones and long lists cut."""
    shown = ", ".join(short(repr(name)) for name in list(names)[:NAMED])
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{shown}{more}" or "none"


def named(noun: str, names: Sequence[str]) -> str:
    """Names in quotes after their noun: the column 'a', the columns 'a', 'b'."""
    return f"the {noun}{'s' if len(names) > 1 else ''} {listed(names)}"


def kind_of(path: Path) -> str:
    """The suffix that names the kind of a file: ".jsonl" of rows.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return ([""] + [suffix for suffix in suffixes if suffix not in COMPRESSED])[-1] if suffixes else ""
