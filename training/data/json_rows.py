"""Finds the rows in a JSON text: a list, one object a line, objects one after the other, or an object that holds them.

Parsing decides which of these forms a text has. Numbers keep the text that the file has."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Set
from typing import Any

from training.data.table import Number, Table, and_more, listed, short, short_repr
from training.errors import DataError, DuplicateKeyError

_SPACE = re.compile(r"[ \t\n\r]*")


def table_of(rows: list[Any], source: str, not_read: Collection[str] = ()) -> Table:
    """A table of objects. Raises DataError with the rows that are none."""
    others = [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]
    if others:
        row = rows[others[0] - 1]
        is_chat = isinstance(row, list) and _is_conversation(row)
        advice = '. Write each conversation as {"messages": [...]}' if is_chat else ""
        raise DataError(
            f"{source}, row {others[0]}: {short_repr(row)} is not an object with named columns"
            f"{and_more(others, 'rows')}{advice}"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(source, names, len(rows), lambda name: [row.get(name) for row in rows], list(not_read))


def json_table(text: str, source: str, known: Set[str]) -> Table:
    """The table of a JSON text. `known`: names of columns by which an object is understood.

    Raises DataError with line and column of a fault.
    """
    rows, not_read = _rows_of_json(text, source, known)
    return table_of(rows, source, not_read)


def _rows_of_json(text: str, source: str, known: Set[str]) -> tuple[list[Any], list[str]]:
    """(rows, what is not read) of a JSON text."""
    start = _skip_space(text, 0)
    if start == len(text):
        return [], []
    error: ValueError | RecursionError | None = None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as failed:
        error = failed
    else:
        end = _skip_space(text, end)
        if end == len(text):
            return _rows_of_value(value, source, known)
        if text[start] == "[":
            error = json.JSONDecodeError("Extra data", text, end)
    rows, broken = _rows_of_lines(text)
    if not broken:
        return rows, []
    if text[start] == "{":
        try:
            return _rows_of_stream(text, start), []
        except (ValueError, RecursionError) as failed:
            error = error or failed
        if any(isinstance(row, dict) for row in rows):  # one object a line
            line, reason = broken[0]
            more = and_more([number for number, _ in broken], "lines")
            raise DataError(f"{source}, line {line}: {reason}{more}") from error
    if error is None:
        line, reason = broken[0]
        raise DataError(f"{source}, line {line}: {reason}")
    row = f" in row {_failing_row(text, start)}" if text[start] == "[" else ""
    where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    raise DataError(f"{source}{where}: {_reason(error)}{row}") from error


def _reason(error: Exception) -> str:
    """What is wrong with a JSON text, with the column."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)  # duplicate key, deep nesting
    advice = ""
    if error.msg.startswith("Invalid control character"):
        advice = ". Write a tab as \\t and a line break as \\n"
    return f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}{advice}"


def _rows_of_lines(text: str) -> tuple[list[Any], list[tuple[int, str]]]:
    """(values, [(line number, what is wrong)]) of a text with one value a line."""
    values: list[Any] = []
    broken: list[tuple[int, str]] = []
    # Not str.splitlines: it also splits at U+2028 and similar characters, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(_DECODER.decode(line))
        except (ValueError, RecursionError) as error:
            broken.append((number, _reason(error)))
    return values, broken


def _rows_of_stream(text: str, position: int) -> list[Any]:
    """Objects that follow one another, each over any number of lines. Raises ValueError or RecursionError."""
    rows = []
    while position < len(text):
        if text[position] != "{":
            raise json.JSONDecodeError("Extra data", text, position)
        row, position = _DECODER.raw_decode(text, position)
        rows.append(row)
        position = _skip_space(text, position)
    return rows


def _failing_row(text: str, start: int) -> int:
    """The number of the element at which a list cannot be decoded."""
    position, row = start + 1, 1
    while True:
        try:
            _, position = _DECODER.raw_decode(text, _skip_space(text, position))
        except (ValueError, RecursionError):
            return row
        position = _skip_space(text, position)
        if text[position : position + 1] != ",":
            return row
        position, row = position + 1, row + 1


def _rows_of_value(value: Any, source: str, known: Set[str]) -> tuple[list[Any], list[str]]:
    """(rows, what is not read) of a text that is one JSON value."""
    if isinstance(value, list):
        return value, []
    if not isinstance(value, dict):
        return [value], []
    columns = {name: column for name, column in value.items() if name in known}
    if columns:
        return _rows_of_columns(value, columns, source), []
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list)}
    if lists:
        chosen = "train" if "train" in lists else next(iter(lists))
        if len(lists) > 1 and not any(isinstance(row, dict) for rows in lists.values() for row in rows[:1]):
            return _rows_of_columns(value, lists, source), []  # columns with names of another project
        if len(lists) > 1 and chosen != "train":
            raise DataError(
                f"{source}: holds the lists {listed(lists)}; expected one list of rows. "
                f"Take one out: jq {shlex.quote(f'.[{json.dumps(chosen)}]')} {shlex.quote(source)} > rows.json"
            )
        return lists[chosen], [f"{short(repr(name))} beside {chosen!r}" for name in value if name != chosen]
    if not any(isinstance(row, dict) for row in value.values()):
        return [value], []  # one row, with names of another project
    if all(isinstance(row, dict) and not known.isdisjoint(row) for row in value.values()):
        return list(value.values()), []  # pandas' to_json(orient="index"): each row under its index
    raise DataError(f"{source}: holds one object with {listed(value)}; expected a list of rows")


def _rows_of_columns(value: dict[str, Any], columns: dict[str, Any], source: str) -> list[Any]:
    """Rows of an object with columns: one row, lists, or pandas' objects {index: value}."""
    if all(isinstance(column, dict) for column in columns.values()):
        if len({tuple(column) for column in columns.values()}) > 1:
            raise DataError(f"{source}: the columns {listed(columns)} have different indices")
        value = {name: list(column.values()) for name, column in value.items() if isinstance(column, dict)}
    elif not all(isinstance(column, list) and not _is_conversation(column) for column in columns.values()):
        return [value]
    lists = {name: column for name, column in value.items() if isinstance(column, list)}
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name!r} {count:,}" for name, count in lengths.items())
        raise DataError(f"{source}: the columns differ in length: {counts} values")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _is_conversation(values: list[Any]) -> bool:
    """Whether a list is the messages of one row, and not a column."""
    return bool(values) and all(isinstance(v, dict) and not {"role", "from"}.isdisjoint(v) for v in values)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match
    return match.end()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DuplicateKeyError(f"column {repeated!r} appears twice")
    return row


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=Number,
    parse_float=Number,
    parse_constant=lambda name: None if name == "NaN" else float(name),  # Infinity, -Infinity
)
