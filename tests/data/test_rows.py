"""Sources are read into three columns of strings; errors name the file and the row."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import jsonl, write
from training.consts import DEMO
from training.data.rows import Columns, read_columns
from training.data.tokens import prepare_dataset
from training.errors import DataError

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "text": "not read"},
    {"instruction": "Greet.", "input": "", "output": 'She said "hi",\r\nthen left', "text": "not read"},
]
DOLLY_15K = [
    {"instruction": "Add.", "context": "1 2", "response": "3", "category": "sum"},
    {"instruction": "Greet.", "context": "", "response": 'She said "hi",\r\nthen left', "category": "greet"},
]
READ = Columns(["Add.", "Greet."], ["1 2", ""], ["3", 'She said "hi",\r\nthen left'])


def as_json(path: Path, rows: list[dict[str, Any]]) -> str:
    return write(path.with_suffix(".json"), json.dumps(rows, indent=2))


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    return jsonl(path.with_suffix(".jsonl"), rows)


def as_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path.with_suffix(".csv"))


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


Writer = Callable[[Path, list[dict[str, Any]]], str]
WRITERS = [as_json, as_jsonl, as_csv, as_parquet]


@pytest.mark.parametrize("rows", [ALPACA, DOLLY_15K], ids=["alpaca", "dolly-15k"])
@pytest.mark.parametrize("writer", WRITERS)
def test_all_file_formats_give_the_same_rows_with_a_bom_and_without_optional_columns(
    tmp_path: Path, writer: Writer, rows: list
) -> None:
    path = Path(writer(tmp_path / "rows", rows))
    assert read_columns(str(path)) == READ
    if writer is not as_parquet:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read_columns(str(path)) == READ
    rows = [
        {name: row[name] for name in row if name in ("instruction", "output", "response")} for row in rows
    ]
    assert read_columns(writer(tmp_path / "rows", rows)) == Columns(READ.instruction, ["", ""], READ.output)


def test_an_upper_case_suffix_and_a_tilde_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "rows.JSONL", ALPACA)
    assert read_columns("~/rows.JSONL") == READ


def test_jsonl_skips_blank_lines_keeps_unicode_separators_and_allows_a_missing_or_null_input(
    tmp_path: Path,
) -> None:
    odd, row = "a\u2028b\u2029c\x85d", '{"instruction": "x", "output": '
    lines = f'{row}"{odd}"}}\r\n\r\n{row}"y", "input": null}}\n\n{row}"z", "input": "c"}}\n'
    path = write(tmp_path / "rows.jsonl", lines)
    assert read_columns(path) == Columns(["x"] * 3, ["", "", "c"], [odd, "y", "z"])


def test_csv_fields_may_hold_quotes_newlines_null_bytes_and_a_megabyte(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    path = write(tmp_path / "rows.csv", f'instruction,output\n"a\n""b"",\n",{long}\nc,d\0e\n')
    assert read_columns(path) == Columns(['a\n"b",\n', "c"], ["", ""], [long, "d\0e"])


def test_csv_of_spreadsheets_may_have_empty_lines_before_the_header_and_columns_without_names(
    tmp_path: Path,
) -> None:
    columns = read_columns(write(tmp_path / "rows.csv", "\n\r\n,instruction,output,,\n1,a,b,,\n2,c,d,,\n"))
    assert columns == Columns(["a", "c"], ["", ""], ["b", "d"])
    assert columns.not_read == ["the column ''"]


def test_the_demo_rows_need_no_file() -> None:
    columns = read_columns(DEMO)
    assert len(columns) > 1000
    assert any(columns.input)
    assert not all(columns.input)


def test_the_train_split_of_a_hub_dataset_is_loaded_and_a_failure_names_the_dataset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = []

    def load(name: str, split: str) -> datasets.Dataset:
        requests.append((name, split))
        if len(requests) > 1:
            raise ConnectionError("no route")
        return datasets.Dataset.from_list(ALPACA)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_columns("tatsu-lab/alpaca") == READ
    assert requests == [("tatsu-lab/alpaca", "train")]
    with pytest.raises(DataError, match=r"tatsu-lab/alpaca: not a local file.*ConnectionError: no route"):
        read_columns("tatsu-lab/alpaca")


GOOD = '{"instruction": "a", "output": "b"}'
# The second line of a JSONL file whose first is good.
BAD_LINES = {
    "two objects with a comma in a line": (f"{GOOD}, {GOOD}", "line 2: broken JSON: Extra data at column 36"),
    "infinity": (
        '{"instruction": "a", "output": -Infinity}',
        "row 2: output is float -inf, expected a string",
    ),
    "nested": (
        '{"instruction": "a", "output": {"b": 1}}',
        "row 2: output is dict {'b': 1}, expected a string",
    ),
    "a number as a row": ("7", "row 2: number 7 is not an object"),
    "a duplicate key": (GOOD[:-1] + ', "output": "c"}', "line 2: column 'output' appears twice"),
    "both names": (GOOD[:-1] + ', "response": "c"}', "has both 'output' and 'response'"),
    "two names of the input in different rows": (
        f'{GOOD[:-1]}, "input": "c"}}\n{GOOD[:-1]}, "context": "d"}}',
        "has both 'input' and 'context'",
    ),
    "half of a surrogate pair": (
        r'{"instruction": "a", "output": "\ud83d"}',
        "row 2: output has half of a surrogate pair",
    ),
    "deep nesting": ('{"a":' * 100_000, "line 2: maximum recursion depth"),
}
BAD_FILES = {
    "empty file": ("x.json", b"", "the file is empty"),
    "empty list": ("x.json", b"[]", "no rows. Name a file or a dataset that has some"),
    "only blank lines": ("x.jsonl", b"\n\n", "no rows"),
    "only a header": ("x.csv", b"instruction,output\n", "no rows"),
    "broken list": ("x.json", b'[\n{"instruction": "a",\n"output": }]', "line 3: broken JSON"),
    "broken line": ("x.jsonl", f"{GOOD}\n\n{GOOD[:-1]}\n".encode(), "line 3: broken JSON"),
    "half of a list": ("x.json", f"[{GOOD},".encode(), "line 1: broken JSON"),
    "missing columns": (
        "x.jsonl",
        b'{"prompt": "a", "answer": "b"}',
        "no column 'instruction' and no column 'output' or 'response'. Found 'prompt', 'answer'; expected",
    ),
    "a nested input": (
        "x.json",
        b'[{"instruction": "a", "output": "b", "input": ["c"]}]',
        "row 1: input is list ['c'], expected a string",
    ),
    "strings as rows": ("x.json", b'["a", "b"]', "row 1: str 'a' is not an object"),
    "a huge number in a list": ("x.json", f"[{'1' * 5000}]".encode(), "row 1: number 11111"),
    "deeply nested lists": ("x.json", b"[" * 100_000, "maximum recursion depth"),
    "Latin-1 in a late row": (  # the CSV reader counts bytes from its buffer
        "x.csv",
        b"instruction,output\n" + b"a,b\n" * 10_000 + b"\xe9,c\n",
        "line 10002: not UTF-8 at byte 40,019",
    ),
    "Latin-1 after a byte order mark": (
        "x.jsonl",
        f"\ufeff{GOOD}\n".encode() + b"\xe9",
        "line 2: not UTF-8 at byte 39",
    ),
    "an unclosed quote in an early row": (
        "x.csv",
        b'instruction,output\na,"b\n' + b"c,d\n" * 50 + b'"e","f"\n',
        "line 2: broken CSV",
    ),
    "Latin-1": ("x.jsonl", '{"instruction": "é", "output": "b"}'.encode("latin-1"), "not UTF-8 at byte 17"),
    "half of a UTF-16 character": (
        "x.csv",
        "instruction,output\na,b\n".encode("utf-16")[:-1],
        "has the byte order mark of UTF-16, but is not UTF-16 (truncated data). Save the file as UTF-8",
    ),
    "a duplicate column": (
        "x.csv",
        b"instruction,output,output\na,b,c\n",
        "line 1: column 'output' appears twice",
    ),
    "JSON under the name of CSV": (
        "x.csv",
        f"[{GOOD}]".encode(),
        "is JSON, not CSV. Let its name end in .json",
    ),
    "too few fields": ("x.csv", b"instruction,output\na,b\nc\n", "line 3: 1 fields, but the header has 2"),
    "an unclosed quote": ("x.csv", b'instruction,output\na,b\nc,"d\n', "line 3: broken CSV"),
    "spaces in a header": ("x.csv", b"instruction, output\na, b\n", "Rename ' output' to 'output'"),
    "csv without columns": ("x.csv", b"a,b\n1,2\n", "Found 'a', 'b'"),
    "not Parquet": ("x.parquet", b"PAR1 but not Parquet", "not a readable Parquet file"),
    "unknown suffix": ("x.txt", b"instruction", "cannot read '.txt' files. Expected one of .json"),
    "no suffix": ("x", b"instruction", "cannot read '' files"),
    **{name: ("x.jsonl", f"{GOOD}\n{line}\n", message) for name, (line, message) in BAD_LINES.items()},
}


def assert_refused(path: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_columns(path)
    assert str(error.value).startswith(path)
    assert str(error.value).count(path) == 1
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_row(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    assert_refused(write(tmp_path / name, content), message)


def table_of(*output: Any) -> pa.Table:
    """A Parquet table with these values in its output column."""
    [answers] = output if isinstance(output[0], pa.Array) else [pa.array(output)]
    return pa.table({"instruction": ["a"] * len(answers), "output": answers})


ENDS, BYTES = pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"c\xff")
BAD_TABLES = {
    "infinity": (table_of(1.5, float("inf")), "row 2: output is float inf"),
    "bytes": (table_of(b"c"), "row 1: output is bytes b'c'"),
    "nested": (table_of({"b": "c"}), "row 1: output is dict {'b': 'c'}"),
    "a date outside of Python's range": (
        table_of(pa.array([2**31 - 1], pa.date32())),
        "row 1: a date32[day] that cannot be read (days=2147483647",
    ),
    "text that is not UTF-8": (
        table_of(pa.Array.from_buffers(pa.string(), 2, [None, ENDS, BYTES])),
        "row 2: a string that cannot be read ('utf-8' codec",
    ),
    "missing": (pa.table({"text": ["a"]}), "no column 'instruction'"),
    "no rows": (table_of(pa.array([], pa.string())), "no rows"),
    "a duplicate column": (table_of("b").append_column("output", [["c"]]), "column 'output' appears twice"),
}


@pytest.mark.parametrize(("table", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_parquet_table_is_refused_with_its_row(tmp_path: Path, table: pa.Table, message: str) -> None:
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert_refused(str(tmp_path / "x.parquet"), message)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows.json").mkdir()
    for source, message in {
        str(tmp_path / "none.jsonl"): "no such file",
        str(tmp_path / "none"): "no such file",
        "./none": "no such file",
        "../a/b/none.csv": "no such file",
        str(tmp_path / "rows"): "a folder without data files. Expected .json, .jsonl, .csv, .parquet",
        str(tmp_path / "rows.json"): "a folder without data files",
    }.items():
        with pytest.raises(DataError, match=message):
            read_columns(source)


def assert_source_refused(source: str, tokenizer: PreTrainedTokenizerBase, message: str) -> None:
    """Checks that reading the source and looking for its cache fail with the same message."""
    for use in (read_columns, lambda source: prepare_dataset(source, tokenizer, 64)):
        with pytest.raises(DataError, match=message):
            use(source)


@pytest.mark.timeout(60)
def test_a_pipe_is_refused_at_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pipe, device = tmp_path / "rows.jsonl", tmp_path / "zero.csv"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for source in (str(pipe), str(device)):
        assert_source_refused(source, tokenizer, r"is a pipe or a device\. Write the rows to a file first")


@pytest.mark.parametrize(
    "source", ["x" * 5000, "x" * 300 + ".json", "~nobody-here/rows.json", "csv/" + "x" * 300, "~\0"]
)
def test_an_impossible_file_name_is_refused(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    shown = source.replace("\0", "\ufffd")  # a terminal must not see it
    assert_source_refused(source, tokenizer, f"^{shown}: ")


@pytest.mark.parametrize("name", ["csv", "json", "parquet", "text"])
def test_the_name_of_a_file_format_does_not_load_files_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    as_csv(tmp_path / "somebody_elses", ALPACA)
    with pytest.raises(DataError, match=f"'{name}' is not the name of a dataset. Expected a .json"):
        read_columns(name)


def test_a_file_without_read_permission_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ALPACA)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert_source_refused(path, tokenizer, r"rows.jsonl: cannot be read \(.*Permission denied")
