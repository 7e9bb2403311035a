"""Matches the columns of a source to instruction, input and output, and checks that their values are text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from training.data.table import (
    CONVERSATIONS,
    Table,
    and_more,
    is_unicode,
    listed,
    named,
    short_repr,
    text_of,
)
from training.errors import DataError, printable

if TYPE_CHECKING:
    from training.data.conversations import ConversationError, History

# Alpaca's name first, then dolly-15k's.
COLUMN_NAMES = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
}
KNOWN = frozenset([*(name for names in COLUMN_NAMES.values() for name in names), *CONVERSATIONS])
CATEGORY = "category"  # of a row, as in dolly-15k: it groups the rows of an evaluation
RENDERED = "text"  # Alpaca's whole row as one text: nothing is lost if it is not read
REQUIRED = ("instruction", "output")  # columns of training rows
REQUIRED_COLUMNS_HELP = (
    "expected instruction and output (as in Alpaca; input is optional), "
    "or instruction and response (as in dolly-15k; context is optional), or messages (conversations)"
)
# Names of other projects, in lower case: what to rename.
OTHER_NAMES = {
    "instruction": ("instruction", "instructions", "prompt", "question", "query"),
    "output": ("output", "outputs", "response", "responses", "completion", "answer", "target"),
}
DIALOGUES = ("dialog", "dialogue")


@dataclass
class Columns:
    """The three columns of a dataset, of equal length. A value that is missing is "".

    In a conversation they are its last turn: what was asked last, with the system message before it, and the answer.

    Attributes:
        history: the turns before the last one, of each row; empty if no row has any.
        unusable: conversations that cannot be used, by their place from 0, whose columns are "".
        unanswered: rows, from 1, whose last question has no answer and is left out.
        files: rows of each file by its name, in the order of the rows; empty unless the source is a folder.
        not_read: what the source holds besides these columns, in words.
        category: the value of the column 'category' of each row; empty without such a column. Training ignores it.
    """

    instruction: list[str]
    input: list[str]
    output: list[str]
    files: dict[str, int] = field(default_factory=dict, compare=False)
    not_read: list[str] = field(default_factory=list, compare=False)
    category: list[str] = field(default_factory=list, compare=False, repr=False)
    history: list[History] = field(default_factory=list)
    unusable: dict[int, ConversationError] = field(default_factory=dict, compare=False)
    unanswered: list[int] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.instruction)


def columns_of(tables: Sequence[Table], source: str, required: tuple[str, ...]) -> tuple[Columns, list[str]]:
    """(columns, names of the columns that are not read) of one dataset from its tables. Raises DataError.

    Rows without the required columns are "" if there is a column of conversations.
    """
    if not any(table.count or table.names for table in tables):
        return Columns([], [], []), []
    names = list(dict.fromkeys(name for table in tables for name in table.names))
    for table in tables:
        if repeated := next((name for name in KNOWN if table.names.count(name) > 1), None):
            raise DataError(f"{table.source}: column {repeated!r} appears twice. Keep one of the two")
        if table.count:
            _match_columns(table.names, table.source, required, [table])
    matched = _match_columns(names, source, required, tables)
    columns = Columns([], [], [])
    for table in tables:
        for key, name in matched.items():
            values = table.values(name) if name in table.names else [None] * table.count
            getattr(columns, key).extend(_texts(values, key, table.source))
        columns.not_read += table.not_read
    columns.category = [printable(text) for text in texts_of(tables, CATEGORY)]
    unread = [name for name in names if name not in matched.values()]
    if RENDERED in unread and _is_rendered(tables[0], columns.output):
        unread.remove(RENDERED)
    return columns, unread


def texts_of(tables: Sequence[Table], name: str) -> list[str]:
    """The texts of an optional column, one per row, "" where missing; [] without it, or if a value is not text."""
    texts: list[str] = []
    if not any(name in table.names for table in tables):
        return []
    for table in tables:
        if table.names.count(name) > 1:
            return []
        try:
            values = table.values(name) if name in table.names else [None] * table.count
        except DataError:  # text that cannot be read
            return []
        texts += [text for text in map(text_of, values) if text is not None and is_unicode(text)]
    return texts if len(texts) == sum(table.count for table in tables) else []


def _is_rendered(table: Table, outputs: Sequence[str]) -> bool:
    """Whether each text is the rendered row: it holds the output. The first rows are compared."""
    if table.names.count(RENDERED) != 1:
        return False
    try:
        first = zip(table.values(RENDERED)[:100], outputs, strict=False)
    except DataError:  # text that cannot be read
        return False
    return all(isinstance(text, str) and output.strip() in text for text, output in first)


def _match_columns(
    found: list[str], source: str, required: tuple[str, ...], tables: Sequence[Table]
) -> dict[str, str | None]:
    """Maps instruction, input and output to the names of their columns in `tables`.

    None for an input that is missing and an output that is not required.
    """
    matched: dict[str, str | None] = {}
    for key, names in COLUMN_NAMES.items():
        present = [name for name in names if name in found and key in (*required, "input")]
        if len(present) > 1:
            raise DataError(
                f"{source}: has both {present[0]!r} and {present[1]!r}. Keep one of the two columns"
            )
        matched[key] = present[0] if present else None
    missing = [key for key in required if matched[key] is None]
    if not missing:
        return matched
    if any(name in CONVERSATIONS for name in found):
        return dict.fromkeys(COLUMN_NAMES)
    expected = REQUIRED_COLUMNS_HELP if required == REQUIRED else "expected instruction; input is optional"
    lower = {name.strip().lower(): name for name in reversed(found)}
    if chat := next((lower[name] for name in (*CONVERSATIONS, *DIALOGUES) if name in lower), None):
        raise DataError(
            f"{source}: its rows are conversations (column {chat!r}). Rename it to 'messages', with a list of messages "
            '{"role": "user", "content": "..."} in each row'
        )
    if {"role", "content"} <= lower.keys() or {"from", "value"} <= lower.keys():
        raise DataError(
            f"{source}: its rows are single messages. Write each conversation as one row: "
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
        )
    lacking = " and no column ".join(" or ".join(map(repr, COLUMN_NAMES[key])) for key in missing)
    others = {key: next((lower[n] for n in OTHER_NAMES[key] if n in lower), None) for key in missing}
    lists = [name for name in others.values() if name and _holds_lists(name, tables)]
    if lists:
        raise DataError(
            f"{source}: {named('column', lists)} hold{'' if lists[1:] else 's'} lists of messages. "
            "Join them into one list in each row, in the column 'messages'"
        )
    renames = " and ".join(f"{name!r} to {key!r}" for key, name in others.items() if name)
    raise DataError(
        f"{source}: no column {lacking}. Found {listed(found)}; {expected}"
        + (f". Rename {renames}" if renames else "")
    )


def _holds_lists(name: str, tables: Sequence[Table]) -> bool:
    """Whether the first value of a column is a list of objects."""
    values = (value for table in tables if table.names.count(name) == 1 for value in table.values(name)[:1])
    return any(isinstance(value, list) and all(isinstance(one, dict) for one in value) for value in values)


def _texts(values: Sequence[Any], key: str, source: str) -> list[str]:
    """The values as text, "" for one that is missing. Raises DataError with the first ten rows that are not text."""
    texts = [text_of(value) for value in values]
    wrong = [number for number, text in enumerate(texts, start=1) if text is None]
    if wrong:
        found = short_repr(values[wrong[0] - 1])
        raise DataError(
            f"{source}, row {wrong[0]}: {key} is {found}, expected a string{and_more(wrong, 'rows')}"
        )
    halves = [number for number, text in enumerate(texts, start=1) if text and not is_unicode(text)]
    if halves:
        raise DataError(
            f"{source}, row {halves[0]}: {key} has half of a surrogate pair{and_more(halves, 'rows')}"
        )
    return [text or "" for text in texts]
