"""Reads rows (instruction, input, output) from a file, a folder of files, the Hub, or from the demo.

Errors name the file and the row. datasets is slow to import, so only the readers that need it do so."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.consts import DEMO, KINDS
from training.data.columns import KNOWN, REQUIRED, Columns, columns_of, texts_of
from training.data.conversations import add_system_prompts, read_turns
from training.data.demo_rows import demo_rows
from training.data.folders import TRAIN, is_saved_dataset, parts_of
from training.data.formats import (
    PARQUET,
    arrow_values,
    csv_table,
    decode,
    decompressed,
    parquet_table,
    refuse_disguise,
)
from training.data.json_rows import json_table, table_of
from training.data.table import SYSTEM_PROMPT, Table, kind_of, listed, named
from training.errors import DataError, offline_note
from training.files import is_hub_name, local_path

# Of two equal sources.
TRAINED_TOO = ", so rows that are held out would also be trained on. Leave one of them out"


def read_columns(source: str, selection: Mapping[str, str] | None = None) -> Columns:
    """Reads the rows of `source`: "demo", a local file or folder, or a dataset on the Hub.

    Args:
        selection: revision, config and split of a dataset on the Hub; the split is train without one.

    Raises DataError, with file and row, if a required column is missing or a value is not text.
    """
    check_source(source, selection or {})
    path = None if source == DEMO else _local_path(source)
    files: dict[str, int] = {}
    not_read: list[str] = []
    if source == DEMO:
        tables = [table_of(demo_rows(), source)]
    elif path is None:
        tables, not_read = _read_hub(source, selection or {})
    elif path.is_dir():
        tables, not_read, files = _read_folder(path)
    else:
        tables = [read_table(path, KINDS)]
    columns = columns_with_turns(tables, source, REQUIRED)
    columns.files = files
    columns.not_read += not_read
    if not len(columns):
        raise DataError(f"{source}: no rows. Name a file or a dataset that has some")
    return columns


def columns_with_turns(tables: Sequence[Table], source: str, required: tuple[str, ...]) -> Columns:
    """The columns of one dataset from its tables, with the turns of its conversations. Raises DataError."""
    columns, unread = columns_of(tables, source, required)
    read = read_turns(tables, columns, required)
    if system_prompts := texts_of(tables, SYSTEM_PROMPT):
        read.add(SYSTEM_PROMPT)
        add_system_prompts(columns, system_prompts)
    if unread := [name for name in unread if name not in read]:
        columns.not_read.insert(0, named("column", unread))
    return columns


def selection_of(source: str, sources: Sequence[str], selection: Mapping[str, str]) -> Mapping[str, str]:
    """Config, split and revision for one of the sources. A single one that is not on the Hub is refused with them."""
    return selection if len(sources) == 1 or is_on_hub(source) else {}


def check_source(source: str, selection: Mapping[str, str]) -> None:
    """Raises DataError if a local `source` is missing, or if a part of it is requested as of a dataset on the Hub."""
    path = None if source == DEMO else _local_path(source)
    missing = not path.exists() if path is not None else source.strip() and not is_hub_name(source)
    if missing:
        raise DataError(
            f"{path or source}: no such file. Expected a {', '.join(KINDS)} file, a folder of them, the name of a dataset on the "
            f"Hub, or '{DEMO}'"
        )
    if problem := selection_problem([source], selection):
        raise DataError(problem)


def selection_problem(sources: Sequence[str], selection: Mapping[str, str]) -> str | None:
    """Why a part of a dataset on the Hub cannot be chosen: none of the sources is there. Raises DataError, as `is_on_hub`."""
    if not selection or any(map(is_on_hub, sources)):
        return None
    flags = " and ".join(f"--dataset-{name}" for name in selection)
    are = "is" if len(sources) == 1 else "are"
    return (
        f"{', '.join(sources)}: {are} not on the Hub, so {flags} would be ignored. "
        "Leave it out, or name a dataset on the Hub"
    )


def is_on_hub(source: str) -> bool:
    """Whether the source is a name on the Hub. Raises DataError for a URL, or a path that cannot be used."""
    return source != DEMO and _local_path(source) is None


def check_sources(sources: Sequence[str], selection: Mapping[str, str]) -> None:
    """Raises DataError with all of `source_problems`."""
    if problems := source_problems(sources, selection):
        raise DataError("\n".join(problems))


def source_problems(sources: Sequence[str], selection: Mapping[str, str]) -> list[str]:
    """Problems of the sources, each beginning with its name, and of a `selection` without a source on the Hub."""
    problems = []
    for source in dict.fromkeys(sources):
        try:
            check_source(source, {})
        except DataError as error:
            several = ". For several sources, repeat the option" if "," in source else ""
            problems.append(f"{error}{several}")
    if not problems and (problem := selection_problem(sources, selection)):
        problems.append(problem)
    return problems + _repeated(sources)


def _repeated(sources: Sequence[str]) -> list[str]:
    """A problem for each source with a file of an earlier one: what one holds out, the other would train on."""
    problems, earlier = [], dict[str, str]()
    places_of = {source: _places(source) for source in sources if source.strip()}
    for source in filter(str.strip, sources):
        places = places_of[source]
        if shared := next((place for place in places if place in earlier), None):
            other = earlier[shared]
            is_same = len(places) == len(places_of[other]) == 1
            same = "is the same as" if is_same else f"shares {Path(shared).name} with"
            problem = "is named twice" if source == other else f"{same} {other}"
            problems.append(f"{source}: {problem}{TRAINED_TOO}")
        earlier = dict.fromkeys(places, source) | earlier
    return list(dict.fromkeys(problems))


def _places(source: str) -> list[str]:
    """The real path of each file of a source, or the name of one that is not local."""
    try:
        files = local_files(source) or {}
    except DataError:  # reported where the source is read
        files = {}
    return [*map(os.path.realpath, files.values())] or [source.lower() if is_hub_name(source) else source]


def local_files(source: str) -> dict[str, Path] | None:
    """The files that hold the rows of `source`; None if it is no local file or folder. Raises DataError.

    The keys are what matters of their names: in a folder the name, else the kind.
    """
    path = None if source == DEMO else _local_path(source)
    try:
        if path is None or not (path.is_file() or path.is_dir()):
            return None
        if path.is_file():
            return {kind_of(path): path}
        saved = is_saved_dataset(path)
        files = sorted(filter(Path.is_file, path.rglob("*"))) if saved else parts_of(path, KINDS).files
        return {str(file.relative_to(path)): file for file in files}
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error})") from error


def _local_path(source: str) -> Path | None:
    """The path of a local file or folder, also of one that is missing; None for a name on the Hub."""
    if not source.strip():  # not the current folder
        return None
    if "://" in source:
        raise DataError(f"{source}: is a URL. Copy it to a local file or folder, and name that")
    try:
        path = local_path(source)
        is_local = path.exists() or kind_of(path) in KINDS or source.startswith("dbfs:")
        return path if is_local else None
    except (OSError, RuntimeError, ValueError) as error:
        # a name that is too long, a folder without permission, an unknown ~user, a null byte
        raise DataError(f"{source}: cannot be read ({error})") from error


# --- a file -------------------------------------------------------------------------------------------


def read_table(path: Path, kinds: Collection[str]) -> Table:
    """Reads a file of one of `kinds`.

    Raises DataError, with the line or row, if the file is missing, empty, unreadable or of another kind.
    """
    expected = ", ".join(kinds)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.is_dir():
            raise DataError(f"{path}: is a folder. Name one file in it ({expected})")
        if not path.is_file():  # opening a pipe can block forever
            raise DataError(f"{path}: is a pipe or a device. Write the rows to a file first")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        if kind_of(path) not in kinds:
            suffix = "".join(path.suffixes[-1:])
            raise DataError(f"{path}: cannot read '{suffix}' files. Expected one of {expected}")
        with path.open("rb") as stream:
            first = stream.read(64)
        if first.startswith(PARQUET):  # not read into memory
            return parquet_table(path, str(path))
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return _table_of_bytes(decompressed(content, str(path)), path)


def _table_of_bytes(content: bytes, path: Path) -> Table:
    source, kind = str(path), kind_of(path)
    if content.startswith(PARQUET):
        return parquet_table(io.BytesIO(content), source)
    refuse_disguise(content, source)
    if kind == ".parquet":
        raise DataError(f"{source}: not a readable Parquet file (it does not begin with PAR1)")
    text = decode(content, source)
    if kind == ".csv":
        return csv_table(text, source)
    if kind == ".txt":
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        return table_of([{"instruction": line} for line in lines], source)
    return json_table(text, source, KNOWN)


# --- folders and the Hub ------------------------------------------------------------------------------


def _read_folder(folder: Path) -> tuple[list[Table], list[str], dict[str, int]]:
    """(tables, what is not read, rows of each file) of a folder. Raises DataError."""
    try:
        if is_saved_dataset(folder):
            return *_read_saved(folder), {}
        parts = parts_of(folder, KINDS)
        # Spark writes empty files for partitions without rows.
        filled = [file for file in parts.files if not file.is_file() or file.stat().st_size]
        tables = [read_table(file, KINDS) for file in filled]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error})") from error
    tables = [table for table in tables if table.count or table.names]
    for table in tables[1:]:
        # JSON leaves out values that are missing, so a part may lack a column.
        if kind_of(Path(table.source)) in (".csv", ".parquet") and set(table.names) != set(tables[0].names):
            raise DataError(
                f"{table.source}: has the columns {listed(table.names)}, but {Path(tables[0].source).name} has "
                f"{listed(tables[0].names)}. The files of a folder need the same columns"
            )
    not_read = [named("file", parts.not_read)] if parts.not_read else []
    return tables, not_read, {str(Path(t.source).relative_to(folder)): t.count for t in tables}


def _read_saved(folder: Path) -> tuple[list[Table], list[str]]:
    """(table, splits that are not read) of a folder that save_to_disk wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises unrelated types for damaged files
        raise DataError(
            f"{folder}: was written by save_to_disk of datasets, but cannot be loaded "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        return [_table_of_dataset(saved, str(folder))], []
    if TRAIN not in saved:
        raise DataError(
            f"{folder}: has the splits {listed(saved)}, and no train. Name the folder of one: {folder / next(iter(saved))}"
        )
    others = [name for name in saved if name != TRAIN]
    return [_table_of_dataset(saved[TRAIN], str(folder))], [named("split", others)] if others else []


def _read_hub(name: str, selection: Mapping[str, str]) -> tuple[list[Table], list[str]]:
    """(table, splits that are not read) of a dataset on the Hub. Raises DataError."""
    import datasets

    kinds = ", ".join(KINDS)
    # `datasets` reads a name such as "csv" as a file format, and would load any such file in the working folder.
    modules = Path(datasets.__file__).parent / "packaged_modules"
    if not name.strip() or os.path.isdir(modules / name):  # False if the name is too long
        raise DataError(
            f"'{name}' is not the name of a dataset. "
            f"Expected a {kinds} file, the name of a dataset on the Hub, or '{DEMO}'"
        )
    arguments = {"name" if key == "config" else key: value for key, value in selection.items()}
    split = arguments.pop("split", TRAIN)
    try:
        dataset = datasets.load_dataset(name, split=split, **arguments)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        advice = f"Without network access, use a local {kinds} file or '{DEMO}'"
        if isinstance(error, ValueError | FileNotFoundError):  # not those of the network
            for part in ("revision", "split", "config"):
                if part in str(error).lower():
                    advice = f"Choose one with --dataset-{part}"
                    break
        raise DataError(
            f"{name}: not a local file, and could not be loaded from the Hub ({type(error).__name__}: {error}). "
            f"{advice}{offline_note()}"
        ) from error
    others = [other for other in dataset.info.splits or () if other not in split]
    return [_table_of_dataset(dataset, name)], [named("split", others)] if others else []


def _table_of_dataset(dataset: Any, source: str) -> Table:
    def values(name: str) -> list[Any]:
        column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
        return arrow_values(column, source)

    return Table(source, dataset.column_names, len(dataset), values)
