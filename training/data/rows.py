"""Reads a source into three columns of strings: a JSON list, JSONL, CSV or Parquet file, a dataset on the Hub, the demo.

Errors name the file and the row, before anything expensive. pyarrow and datasets are imported only where they read."""

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
from training.errors import DataError, DuplicateKeyError

# Alpaca's name first, then dolly-15k's. A `text` column is ignored: it is the rendered row.
COLUMN_NAMES = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
}
NEEDED = ("instruction", "output")  # of a row to train on
NEEDED_WORDS = (
    "needed are instruction and output (as in Alpaca; input may be left out), "
    "or instruction and response (as in dolly-15k; context may be left out)"
)


@dataclass
class Columns:
    """The three columns of a dataset, all of one length, all strings. `input` is "" where a row has none."""

    instruction: list[str]
    input: list[str]
    output: list[str]

    def __len__(self) -> int:
        return len(self.instruction)


Readers = Mapping[str, Callable[[Path], Columns]]


def read_columns(source: str) -> Columns:
    """Rows of `source`: "demo", a local JSON list, JSONL, CSV or Parquet file, or a dataset on the Hub.

    Raises DataError, naming file and row, for whatever is not a table of strings with the needed columns.
    """
    if source == DEMO:
        return _select(demo_rows(), source)
    try:
        path = Path(source).expanduser()
        local = path.suffix.lower() in READERS or path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # too long a name, a folder that may not be entered, ~nobody, a null byte
        raise DataError(f"{source}: cannot be read ({error})") from error
    columns = _read_file(path, READERS) if local else _read_hub(source)
    if not len(columns):
        raise DataError(f"{source}: {too_few_rows(0)}")
    return columns


def too_few_rows(count: int) -> str:
    """How many rows were found, and how many are needed."""
    found = f"{count} row" if count == 1 else f"{count or 'no'} rows"
    return f"{found}, and at least 2 are needed: one to train on, and one held out"


def read_prompts(file: str) -> list[tuple[str, str]]:
    """(instruction, input) of each prompt in a .txt file, one instruction a line, or in a .json or .jsonl file.

    Repeated prompts are returned once. Raises DataError, naming file and row.
    """
    try:
        columns = _read_file(Path(file).expanduser(), PROMPT_READERS)
    except DataError:
        raise
    except (RuntimeError, ValueError) as error:  # ~nobody, a null byte
        raise DataError(f"{file}: cannot be read ({error})") from error
    if not len(columns):
        raise DataError(f"{file}: no instruction in it")
    for number, instruction in enumerate(columns.instruction, start=1):
        if not instruction.strip():
            raise DataError(f"{file}, row {number}: the instruction is empty")
    return list(dict.fromkeys(zip(columns.instruction, columns.input, strict=True)))


def _read_hub(name: str) -> Columns:
    import datasets

    kinds = ", ".join(READERS)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: no such file. Expected a {kinds} file, or a dataset's name on the Hub")
    # `datasets` takes these for kinds of files, not for names: it would load whatever lies in the working folder.
    modules = Path(datasets.__file__).parent / "packaged_modules"
    if not name.strip() or os.path.isdir(modules / name):  # False for a name too long
        raise DataError(
            f"'{name}': no dataset's name. Expected a {kinds} file, a name on the Hub, or '{DEMO}'"
        )
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # the Hub client raises a dozen unrelated types
        raise DataError(
            f"{name}: neither a local file nor a dataset that could be loaded from the Hub "
            f"({type(error).__name__}: {error}). Without a network name a local {kinds} file, or '{DEMO}'"
        ) from error
    wanted = _match_columns(table.column_names, name)
    values = {key: table[column][:] if column else None for key, column in wanted.items()}
    return _check_strings(values, len(table), name)


def _read_file(path: Path, readers: Readers) -> Columns:
    """A file by the reader of its kind. Raises DataError for what is no such file, or an empty one."""
    kinds = ", ".join(readers)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.is_dir():
            raise DataError(f"{path}: a folder. Name one file in it ({kinds})")
        if not path.is_file():  # to open a pipe may wait for ever
            raise DataError(f"{path}: a pipe or a device, no file. Write the rows into a file first")
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
    """(line, byte in the file); a reader's own error counts from its buffer, or from behind the byte order mark."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1, error.start
    return 1, 0  # the file was corrected in the meantime


def _read_lines(path: Path) -> Columns:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    instructions = [line.strip() for line in lines if line.strip()]
    return Columns(instructions, [""] * len(instructions), [""] * len(instructions))


def _read_json(path: Path, needed: tuple[str, ...] = NEEDED) -> Columns:
    """A JSON list of objects, or one object a line; told apart by the first character, not the name."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip()[:1] == "["
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    rows: list[Any] = []
    # Not str.splitlines: it also splits at U+2028 and its like, which may stand inside a JSON string.
    for number, line in enumerate([text] if is_list else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(decoder.decode(line))
        except json.JSONDecodeError as error:
            place = "" if is_list else f" at column {error.colno}"
            raise DataError(
                f"{path}, line {number - 1 + error.lineno}: broken JSON: {error.msg}{place}"
            ) from error
        except (ValueError, RecursionError) as error:  # a key twice, an endless number, endless nesting
            raise DataError(f"{path}{'' if is_list else f', line {number}'}: {error}") from error
    return _select(rows[0] if is_list else rows, str(path), needed)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"column {repeated!r} stands twice in one row")
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
                raise DataError(f"{path}, line 1: column {name!r} stands twice in the header")
            wanted = _match_columns(header, str(path))
            line = reader.line_num + 1  # where a row begins: an open quote runs on, and fails far below
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}"
                    )
                rows += [fields] if fields else []
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: broken CSV: {error}") from error
    places = {key: header.index(column) if column else None for key, column in wanted.items()}
    return Columns(**{key: ["" if i is None else row[i] for row in rows] for key, i in places.items()})


def _read_parquet(path: Path) -> Columns:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        wanted = _match_columns(file.schema_arrow.names, str(path))
        table = file.read(columns=[column for column in wanted.values() if column])
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    columns: dict[str, list[Any] | None] = {}
    for key, column in wanted.items():
        values: list[Any] = []
        try:
            for scalar in table[column] if column else ():
                values.append(scalar.as_py())
        except (pyarrow.ArrowException, ValueError, OverflowError, ImportError) as error:
            # no UTF-8, no date of Python's
            raise DataError(
                f"{path}, row {len(values) + 1}: a {table[column].type} that cannot be read ({error})"
            ) from error
        columns[key] = values if column else None
    return _check_strings(columns, table.num_rows, str(path))


def _select(rows: list[Any], source: str, needed: tuple[str, ...] = NEEDED) -> Columns:
    """Columns from a list of objects. Every row must have what is `needed`, under one name."""
    if not rows:
        return Columns([], [], [])
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: {_shown(row)} is not an object with named columns")
    wanted = _match_columns(list(dict.fromkeys(name for row in rows for name in row)), source, needed)
    for key, column in wanted.items():
        for number, row in enumerate(rows, start=1):
            if column and column not in row and key != "input":  # an input may be in some rows only
                raise DataError(
                    f"{source}, row {number}: no column {column!r}; found {', '.join(map(repr, row))}"
                )
    values = {key: [row.get(column) for row in rows] if column else None for key, column in wanted.items()}
    return _check_strings(values, len(rows), source)


def _match_columns(found: list[str], source: str, needed: tuple[str, ...] = NEEDED) -> dict[str, str | None]:
    """Which of the found columns serves as instruction, input and output.

    None where there is no input, and for an output that is not needed.
    """
    matched: dict[str, str | None] = {}
    for key, names in COLUMN_NAMES.items():
        present = [name for name in names if name in found and key in (*needed, "input")]
        for name in present:
            if found.count(name) > 1:  # Parquet allows it; CSV and JSON are refused by their readers
                raise DataError(f"{source}: column {name!r} stands twice. Keep one of the two")
        if len(present) > 1:
            raise DataError(
                f"{source}: has both {present[0]!r} and {present[1]!r}. Keep one of the two columns"
            )
        matched[key] = present[0] if present else None
    missing = [" or ".join(map(repr, COLUMN_NAMES[key])) for key in needed if matched[key] is None]
    if missing:
        words = NEEDED_WORDS if needed == NEEDED else "needed is instruction, and input may be left out"
        raise DataError(
            f"{source}: no column {' and no column '.join(missing)}. Found {', '.join(map(repr, found)) or 'none'}; {words}"
        )
    return matched


def _check_strings(columns: Mapping[str, list[Any] | None], rows: int, source: str) -> Columns:
    """Columns of valid strings, with "" in place of a missing column, and of a missing input."""
    checked: dict[str, list[str]] = {}
    for key, values in columns.items():
        if key == "input" and values:
            values = ["" if value is None else value for value in values]
        for number, value in enumerate(values or [], start=1):
            if not isinstance(value, str):
                raise DataError(f"{source}, row {number}: {key} is {_shown(value)}, expected a string")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{source}, row {number}: {key} has half of a surrogate pair") from error
        checked[key] = values or [""] * rows
    return Columns(**checked)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


READERS: Readers = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_read_json_prompts = partial(_read_json, needed=("instruction",))
PROMPT_READERS: Readers = {".txt": _read_lines, ".json": _read_json_prompts, ".jsonl": _read_json_prompts}
