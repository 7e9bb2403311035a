"""Reads rows (instruction, input, output) from a JSON, JSONL, CSV or Parquet file, from the Hub, or from the demo.

Errors name the file and the row. pyarrow and datasets are slow to import, so only the readers that need them do so."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from training.consts import DEMO
from training.data.demo_rows import demo_rows
from training.errors import DataError, DuplicateKeyError, TooFewRowsError

# Alpaca's name first, then dolly-15k's. Other columns are ignored, also Alpaca's `text`, the rendered row.
COLUMN_NAMES = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
}
REQUIRED = ("instruction", "output")  # columns of training rows
REQUIRED_COLUMNS_HELP = (
    "expected instruction and output (as in Alpaca; input is optional), "
    "or instruction and response (as in dolly-15k; context is optional)"
)


@dataclass
class Columns:
    """The three columns of a dataset, of equal length. `input` is "" for a row without an input."""

    instruction: list[str]
    input: list[str]
    output: list[str]

    def __len__(self) -> int:
        return len(self.instruction)


Readers = Mapping[str, Callable[[Path], Columns]]


def read_columns(source: str) -> Columns:
    """Reads the rows of `source`: "demo", a local JSON, JSONL, CSV or Parquet file, or a dataset on the Hub.

    Raises DataError, with file and row, if a required column is missing or a value is not a string.
    """
    if source == DEMO:
        return _select(demo_rows(), source)
    try:
        path = Path(source).expanduser()
        local = path.suffix.lower() in READERS or path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # a name that is too long, a folder without permission, an unknown ~user, a null byte
        raise DataError(f"{source}: cannot be read ({error})") from error
    columns = _read_file(path, READERS) if local else _read_hub(source)
    if not len(columns):
        raise TooFewRowsError(source, 0)
    return columns


def read_prompts(file: str) -> list[tuple[str, str]]:
    """Reads (instruction, input) pairs from a .json or .jsonl file, or from a .txt file with one instruction per line.

    Duplicates are removed. Raises DataError with file and row.
    """
    try:
        columns = _read_file(Path(file).expanduser(), PROMPT_READERS)
    except DataError:
        raise
    except (RuntimeError, ValueError) as error:  # an unknown ~user, a null byte
        raise DataError(f"{file}: cannot be read ({error})") from error
    if not len(columns):
        raise DataError(f"{file}: has no instructions")
    for number, instruction in enumerate(columns.instruction, start=1):
        if not instruction.strip():
            raise DataError(f"{file}, row {number}: the instruction is empty")
    return list(dict.fromkeys(zip(columns.instruction, columns.input, strict=True)))


def _read_hub(name: str) -> Columns:
    import datasets

    kinds = ", ".join(READERS)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: no such file. Expected a {kinds} file, or the name of a dataset on the Hub")
    # `datasets` reads a name such as "csv" as a file format, and would load any such file in the working folder.
    modules = Path(datasets.__file__).parent / "packaged_modules"
    if not name.strip() or os.path.isdir(modules / name):  # False if the name is too long
        raise DataError(
            f"'{name}' is not the name of a dataset. "
            f"Expected a {kinds} file, the name of a dataset on the Hub, or '{DEMO}'"
        )
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # the Hub client raises a dozen unrelated types
        raise DataError(
            f"{name}: not a local file, and could not be loaded from the Hub ({type(error).__name__}: {error}). "
            f"Without network access, use a local {kinds} file or '{DEMO}'"
        ) from error
    matched = _match_columns(table.column_names, name)
    values = {key: table[column][:] if column else None for key, column in matched.items()}
    return _check_strings(values, len(table), name)


def _read_file(path: Path, readers: Readers) -> Columns:
    """Reads a file by its suffix. Raises DataError if it is missing, empty, unreadable or of another kind."""
    kinds = ", ".join(readers)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.is_dir():
            raise DataError(f"{path}: is a folder. Name one file in it ({kinds})")
        if not path.is_file():  # opening a pipe can block forever
            raise DataError(f"{path}: is a pipe or a device. Write the rows to a file first")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        if path.suffix.lower() not in readers:
            raise DataError(f"{path}: cannot read '{path.suffix}' files. Expected one of {kinds}")
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        line, byte = _first_byte_not_utf8(path.read_bytes())
        raise DataError(f"{path}, line {line}: not UTF-8 at byte {byte:,}. Save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _first_byte_not_utf8(content: bytes) -> tuple[int, int]:
    """Returns (line, byte offset in the file). The reader's own error counts from its buffer or after the BOM."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1, error.start
    return 1, 0  # the file was fixed in the meantime


def _read_lines(path: Path) -> Columns:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    instructions = [line.strip() for line in lines if line.strip()]
    return Columns(instructions, [""] * len(instructions), [""] * len(instructions))


def _read_json(path: Path, required: tuple[str, ...] = REQUIRED) -> Columns:
    """Reads a JSON list of objects, or one object per line. The first character decides which, not the suffix."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip()[:1] == "["
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    rows: list[Any] = []
    # Not str.splitlines: it also splits at U+2028 and similar characters, which are legal inside a JSON string.
    for number, line in enumerate([text] if is_list else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(decoder.decode(line))
        except json.JSONDecodeError as error:
            column = "" if is_list else f" at column {error.colno}"
            raise DataError(
                f"{path}, line {number - 1 + error.lineno}: broken JSON: {error.msg}{column}"
            ) from error
        except (ValueError, RecursionError) as error:  # duplicate key, huge number, deep nesting
            raise DataError(f"{path}{'' if is_list else f', line {number}'}: {error}") from error
    return _select(rows[0] if is_list else rows, str(path), required)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"column {repeated!r} appears twice in one row")
    return row


def _read_csv(path: Path) -> Columns:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields over 128 KiB
    rows, line = [], 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                name = next(column for column in header if header.count(column) > 1)
                raise DataError(f"{path}, line 1: column {name!r} appears twice in the header")
            matched = _match_columns(header, str(path))
            line = reader.line_num + 1  # first line of the row: an unclosed quote only fails many lines later
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}"
                    )
                rows += [fields] if fields else []
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: broken CSV: {error}") from error
    positions = {key: header.index(column) if column else None for key, column in matched.items()}
    return Columns(**{key: ["" if i is None else row[i] for row in rows] for key, i in positions.items()})


def _read_parquet(path: Path) -> Columns:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        matched = _match_columns(file.schema_arrow.names, str(path))
        table = file.read(columns=[column for column in matched.values() if column])
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    columns: dict[str, list[Any] | None] = {}
    for key, column in matched.items():
        values: list[Any] = []
        try:
            for scalar in table[column] if column else ():
                values.append(scalar.as_py())
        except (pyarrow.ArrowException, ValueError, OverflowError, ImportError) as error:
            # text that is not UTF-8, a date outside of Python's range
            raise DataError(
                f"{path}, row {len(values) + 1}: a {table[column].type} that cannot be read ({error})"
            ) from error
        columns[key] = values if column else None
    return _check_strings(columns, table.num_rows, str(path))


def _select(rows: list[Any], source: str, required: tuple[str, ...] = REQUIRED) -> Columns:
    """Turns a list of objects into columns. Every row must have the `required` ones, under the same names."""
    if not rows:
        return Columns([], [], [])
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: {_short_repr(row)} is not an object with named columns")
    matched = _match_columns(list(dict.fromkeys(name for row in rows for name in row)), source, required)
    for key, column in matched.items():
        for number, row in enumerate(rows, start=1):
            if column and column not in row and key != "input":  # input is optional row by row
                raise DataError(
                    f"{source}, row {number}: no column {column!r}; found {', '.join(map(repr, row))}"
                )
    values = {key: [row.get(column) for row in rows] if column else None for key, column in matched.items()}
    return _check_strings(values, len(rows), source)


def _match_columns(
    found: list[str], source: str, required: tuple[str, ...] = REQUIRED
) -> dict[str, str | None]:
    """Maps instruction, input and output to the names of their columns.

    None for an input that is missing and an output that is not required.
    """
    matched: dict[str, str | None] = {}
    for key, names in COLUMN_NAMES.items():
        present = [name for name in names if name in found and key in (*required, "input")]
        for name in present:
            if found.count(name) > 1:  # only Parquet gets here: the CSV and JSON readers refuse it earlier
                raise DataError(f"{source}: column {name!r} appears twice. Keep one of the two")
        if len(present) > 1:
            raise DataError(
                f"{source}: has both {present[0]!r} and {present[1]!r}. Keep one of the two columns"
            )
        matched[key] = present[0] if present else None
    missing = [" or ".join(map(repr, COLUMN_NAMES[key])) for key in required if matched[key] is None]
    if missing:
        expected = (
            REQUIRED_COLUMNS_HELP if required == REQUIRED else "expected instruction; input is optional"
        )
        raise DataError(
            f"{source}: no column {' and no column '.join(missing)}. "
            f"Found {', '.join(map(repr, found)) or 'none'}; {expected}"
        )
    return matched


def _check_strings(columns: Mapping[str, list[Any] | None], rows: int, source: str) -> Columns:
    """Checks that all values are valid strings. A missing input, value or column, becomes ""."""
    checked: dict[str, list[str]] = {}
    for key, values in columns.items():
        if key == "input" and values:
            values = ["" if value is None else value for value in values]
        for number, value in enumerate(values or [], start=1):
            if not isinstance(value, str):
                raise DataError(f"{source}, row {number}: {key} is {_short_repr(value)}, expected a string")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{source}, row {number}: {key} has half of a surrogate pair") from error
        checked[key] = values or [""] * rows
    return Columns(**checked)


def _short_repr(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


READERS: Readers = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_read_json_prompts = partial(_read_json, required=("instruction",))
PROMPT_READERS: Readers = {".txt": _read_lines, ".json": _read_json_prompts, ".jsonl": _read_json_prompts}
