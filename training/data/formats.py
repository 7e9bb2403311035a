"""Bytes of a file to text or a table: gzip and zstd, encodings, CSV, Parquet, and files that are no data.

pyarrow is slow to import, so only Parquet and zstd import it."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.data.table import Table, and_more, short
from training.errors import DataError

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"

# The longer mark comes first: UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Files that are often named like data files, by their first bytes: what they are, and what to type.
DISGUISES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Type git lfs pull in its repository",
    b"<!doctype": "an HTML page, not data. Download the raw file",
    b"<html": "an HTML page, not data. Download the raw file",
    b"pk\x03\x04": "a ZIP archive or an Excel file. Unpack it, or save the sheet as CSV",
    b"bzh": "compressed with bzip2. Unpack it, or use gzip or zstd",
    b"\xfd7zxz\0": "compressed with xz. Unpack it, or use gzip or zstd",
    GZIP: "compressed twice. Unpack it once",
    ZSTD: "compressed twice. Unpack it once",
    b"arrow1": "an Arrow file. Write it as Parquet",
}


def decompressed(content: bytes, source: str) -> bytes:
    """The content of a gzip or zstd file, whatever its name; other content as it is. Raises DataError if damaged."""
    try:
        if content.startswith(GZIP):
            return gzip.decompress(content)
        if content.startswith(ZSTD):
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
                return stream.read()
    except (OSError, EOFError, zlib.error, ValueError) as error:  # gzip's, and pyarrow's
        kind = "gzip" if content.startswith(GZIP) else "zstd"
        raise DataError(f"{source}: broken {kind} ({error}). Fetch the file again") from error
    return content


def suffix_of(content: bytes, otherwise: str) -> str:
    """The suffix of a file whose name was not kept, by its content; `otherwise` if it is neither Parquet nor JSON.

    Raises DataError if a compressed file is damaged or a text is in no known encoding.
    """
    content = decompressed(content, "the file")
    if content.startswith(PARQUET):
        return ".parquet"
    return ".json" if decode(content, "the file").lstrip().startswith(("[", "{")) else otherwise


def refuse_disguise(content: bytes, source: str) -> None:
    """Raises DataError if a file is named like data but is something else, such as a web page."""
    start = content[:200].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for mark, meaning in DISGUISES.items():
        if start.startswith(mark):
            raise DataError(f"{source}: is {meaning}")


def decode(content: bytes, source: str) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 if a byte order mark says so. Raises DataError with line and byte."""
    codec = next((codec for mark, codec in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(codec)
    except UnicodeDecodeError as error:
        if codec != "utf-8-sig":
            raise DataError(
                f"{source}: has the byte order mark of {codec.upper()}, but is not {codec.upper()} "
                f"({error.reason}). Save the file as UTF-8"
            ) from error
    try:
        return content.decode()  # the error above counts from behind the byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source}, line {line}: not UTF-8 at byte {error.start:,}. Save the file as UTF-8"
        ) from error


def csv_table(text: str, source: str) -> Table:
    if re.match(r'\s*(\[\s*)?\{\s*"', text):
        raise DataError(f"{source}: is JSON, not CSV. Let its name end in .json")
    csv.field_size_limit(sys.maxsize)  # the default refuses fields over 128 KiB
    rows: list[list[str]] = []
    ragged: list[tuple[int, int]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1  # first line of the row: an unclosed quote only fails many lines later
    problem = ""
    header: list[str] = []
    try:
        header = next(filter(None, reader), [])  # not an empty line
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                ragged.append((line, len(fields)))
            elif fields:
                rows.append(fields)
            line = reader.line_num + 1
    except csv.Error as error:
        problem = (
            f"{source}, line {line}: broken CSV: {error}. Inside quotes, write a quote as two quotes "
            "(Spark: option('escape', '\"'))"
        )
    separator = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if separator:
        raise DataError(
            f"{source}: Found {short(repr(header[0]))}. Separate the fields with commas, not {separator!r}"
        )
    if ragged:
        more = and_more([line for line, _ in ragged], "lines")
        raise DataError(
            f"{source}, line {ragged[0][0]}: {ragged[0][1]} fields, but the header has {len(header)}{more}"
        )
    if problem:
        raise DataError(problem)
    # Spreadsheets write empty columns, which have no names.
    counts = Counter(column for column in header if column.strip())
    if name := next((column for column, count in counts.items() if count > 1), None):
        raise DataError(f"{source}, line 1: column {name!r} appears twice in the header")

    def values(name: str) -> list[str]:
        index = header.index(name)
        return [row[index] for row in rows]

    return Table(source, header, len(rows), values)


def parquet_table(file: Path | io.BytesIO, source: str) -> Table:
    import pyarrow.parquet

    @contextmanager
    def opened() -> Iterator[Any]:
        """The file, closed after each use: a folder may have more files than a process may open."""
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                yield parquet
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{source}: not a readable Parquet file ({error})") from error

    def values(name: str) -> list[Any]:
        with opened() as parquet:
            column = parquet.read(columns=[name]).column(name)
        return arrow_values(column, source)

    with opened() as parquet:
        return Table(source, parquet.schema_arrow.names, parquet.metadata.num_rows, values)


def arrow_values(column: Any, source: str) -> list[Any]:
    """The values of an Arrow column. Numbers and booleans become their text, and NaN becomes None.

    Raises DataError with the row of a value that Python cannot represent.
    """
    import pyarrow
    import pyarrow.compute

    types = pyarrow.types
    is_float = types.is_floating(column.type)
    kind = column.type
    if is_float or types.is_integer(kind) or types.is_boolean(kind) or types.is_decimal(kind):
        if is_float:
            column = column.cast(pyarrow.float32()) if types.is_float16(kind) else column
            column = pyarrow.compute.if_else(pyarrow.compute.is_nan(column), None, column)
        texts = column.cast(pyarrow.string()).to_pylist()
        # An infinite number has no plain text. It stays a number, which is refused.
        return [float(text) if is_float and text in ("inf", "-inf") else text for text in texts]
    values: list[Any] = []
    try:
        for scalar in column:
            values.append(scalar.as_py(maps_as_pydicts="strict"))
    except (pyarrow.ArrowException, ValueError, KeyError, OverflowError, ImportError) as error:
        # text that is not UTF-8, a key that a map has twice, a date outside of Python's range
        raise DataError(f"{source}, row {len(values) + 1}: a {kind} that cannot be read ({error})") from error
    return values
