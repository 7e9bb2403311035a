"""Sources become three columns of strings; what cannot be read is told with its file and row."""

from __future__ import annotations

import contextlib
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
from conftest import jsonl, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

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
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, writer: Writer, rows: list) -> None:
    assert read_columns(writer(tmp_path / "rows", rows)) == READ


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_without_text_and_input_columns_is_read(tmp_path: Path, writer: Writer) -> None:
    rows = [{"instruction": row["instruction"], "output": row["output"]} for row in ALPACA]
    assert read_columns(writer(tmp_path / "rows", rows)) == Columns(READ.instruction, ["", ""], READ.output)


def test_an_upper_case_suffix_and_the_users_home_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "rows.JSONL", ALPACA)
    assert read_columns("~/rows.JSONL") == READ


@pytest.mark.parametrize("writer", [as_json, as_jsonl, as_csv])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, writer: Writer) -> None:
    path = Path(writer(tmp_path / "rows", ALPACA))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_columns(str(path)) == READ


def test_unicode_line_separators_inside_a_json_string_do_not_end_the_line(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\x85d"
    path = write(tmp_path / "rows.jsonl", f'{{"instruction": "x", "output": "{odd}"}}\n')
    assert read_columns(path).output == [odd]


def test_blank_lines_and_windows_line_ends_in_jsonl_are_no_rows(tmp_path: Path) -> None:
    line = '{"instruction": "x", "output": "y"}'
    assert len(read_columns(write(tmp_path / "rows.jsonl", f"{line}\r\n\r\n{line}\n\n"))) == 2


def test_csv_fields_hold_quotes_newlines_null_bytes_and_a_megabyte(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    path = write(tmp_path / "rows.csv", f'instruction,output\n"a\n""b"",\n",{long}\nc,d\0e\n')
    assert read_columns(path) == Columns(['a\n"b",\n', "c"], ["", ""], [long, "d\0e"])


def test_an_input_may_be_missing_or_null_in_some_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", "input": None},
        {"instruction": "a", "output": "b", "input": "c"},
    ]
    assert read_columns(jsonl(tmp_path / "rows.jsonl", rows)).input == ["", "", "c"]


def test_the_embedded_rows_need_no_file() -> None:
    columns = read_columns(DEMO)
    assert len(columns) > 1000
    assert any(columns.input)
    assert not all(columns.input)


def test_a_name_on_the_hub_is_loaded_and_its_train_split_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ALPACA)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_columns("tatsu-lab/alpaca") == READ
    assert asked == [("tatsu-lab/alpaca", "train")]


def test_a_dataset_that_the_hub_does_not_give_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"tatsu-lab/alpaca: neither a local file.*ConnectionError: no route"):
        read_columns("tatsu-lab/alpaca")


GOOD = '{"instruction": "a", "output": "b"}'
BAD_FILES = {
    "empty file": ("x.json", b"", "the file is empty"),
    "empty list": ("x.json", b"[]", "no rows, and at least 2 are needed"),
    "only blank lines": ("x.jsonl", b"\n\n", "no rows"),
    "only a header": ("x.csv", b"instruction,output\n", "no rows"),
    "broken list": ("x.json", b'[\n{"instruction": "a",\n"output": }]', "line 3: broken JSON"),
    "broken line": ("x.jsonl", f"{GOOD}\n\n{GOOD[:-1]}\n".encode(), "line 3: broken JSON"),
    "half of a list": ("x.json", f"[{GOOD},".encode(), "line 1: broken JSON"),
    "two objects in a line": ("x.jsonl", f"{GOOD}\n{GOOD}{GOOD}".encode(), "line 2: broken JSON: Extra data"),
    "missing columns": (
        "x.jsonl",
        b'{"prompt": "a", "answer": "b"}',
        "no column 'instruction' and no column 'output' or 'response'. Found 'prompt', 'answer'; needed are",
    ),
    "a later row without output": (
        "x.jsonl",
        f'{GOOD}\n{{"instruction": "a"}}'.encode(),
        "row 2: no column 'output'; found 'instruction'",
    ),
    "a number": (
        "x.jsonl",
        f'{GOOD}\n{{"instruction": "a", "output": 4}}'.encode(),
        "row 2: output is int 4, expected a string",
    ),
    "null": ("x.json", b'[{"instruction": null, "output": "b"}]', "row 1: instruction is NoneType None"),
    "NaN": ("x.json", b'[{"instruction": "a", "output": NaN}]', "row 1: output is float nan"),
    "nested": (
        "x.jsonl",
        f'{GOOD}\n{GOOD}\n{{"instruction": "a", "output": {{"b": 1}}}}'.encode(),
        "row 3: output is dict {'b': 1}, expected a string",
    ),
    "a nested input": (
        "x.json",
        b'[{"instruction": "a", "output": "b", "input": ["c"]}]',
        "row 1: input is list ['c'], expected a string",
    ),
    "no objects": ("x.json", b'["a", "b"]', "row 1: str 'a' is not an object"),
    "a number as a row": ("x.jsonl", f"{GOOD}\n7".encode(), "row 2: int 7 is not an object"),
    "a key twice": (
        "x.jsonl",
        f'{GOOD}\n{{"instruction": "a", "output": "b", "output": "c"}}'.encode(),
        "line 2: column 'output' stands twice",
    ),
    "both names": (
        "x.jsonl",
        b'{"instruction": "a", "output": "b", "response": "c"}',
        "has both 'output' and 'response'",
    ),
    "two names of the input in different rows": (
        "x.jsonl",
        f'{GOOD}\n{GOOD[:-1]}, "input": "c"}}\n{GOOD[:-1]}, "context": "d"}}'.encode(),
        "has both 'input' and 'context'",
    ),
    "half of a surrogate pair": (
        "x.jsonl",
        b'{"instruction": "a", "output": "\\ud83d"}',
        "row 1: output has half of a surrogate pair",
    ),
    "an endless number": (
        "x.jsonl",
        f'{GOOD}\n{{"instruction": "a", "output": {"1" * 5000}}}'.encode(),
        "line 2: Exceeds the limit",
    ),
    "an endless number in a list": ("x.json", f"[{'1' * 5000}]".encode(), "Exceeds the limit"),
    "endless nesting": ("x.jsonl", b'{"a":' * 100_000, "line 1: maximum recursion depth"),
    "endless nesting of lists": ("x.json", b"[" * 100_000, "maximum recursion depth"),
    "Latin-1 far behind": (  # a reader counts bytes from its buffer
        "x.csv",
        b"instruction,output\n" + b"a,b\n" * 10_000 + b"\xe9,c\n",
        "line 10002: not UTF-8 at byte 40,019",
    ),
    "Latin-1 behind a byte order mark": (
        "x.jsonl",
        f"\ufeff{GOOD}\n".encode() + b"\xe9",
        "line 2: not UTF-8 at byte 39",
    ),
    "an open quote far above": (
        "x.csv",
        b'instruction,output\na,"b\n' + b"c,d\n" * 50 + b'"e","f"\n',
        "line 2: broken CSV",
    ),
    "Latin-1": ("x.jsonl", '{"instruction": "é", "output": "b"}'.encode("latin-1"), "not UTF-8 at byte 17"),
    "UTF-16": ("x.csv", "instruction,output\na,b\n".encode("utf-16"), "not UTF-8 at byte 0"),
    "a column twice": (
        "x.csv",
        b"instruction,output,output\na,b,c\n",
        "line 1: column 'output' stands twice",
    ),
    "too few fields": ("x.csv", b"instruction,output\na,b\nc\n", "line 3: 1 fields, but the header has 2"),
    "an open quote": ("x.csv", b'instruction,output\na,b\nc,"d\n', "line 3: broken CSV"),
    "csv without columns": ("x.csv", b"a,b\n1,2\n", "Found 'a', 'b'"),
    "no Parquet": ("x.parquet", b"PAR1 no, this is none", "not a readable Parquet file"),
    "unknown suffix": ("x.txt", b"instruction", "cannot read '.txt' files. Expected one of .json"),
    "no suffix": ("x", b"instruction", "cannot read '' files"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_columns(path)
    assert str(error.value).startswith(path)
    assert str(error.value).count(path) == 1
    assert message in str(error.value)


BAD_TABLES = {
    "a number": (pa.table({"instruction": ["a", "b"], "output": [1, 2]}), "row 1: output is int 1"),
    "null": (pa.table({"instruction": ["a", "b"], "output": ["c", None]}), "row 2: output is NoneType None"),
    "bytes": (pa.table({"instruction": ["a"], "output": [b"c"]}), "row 1: output is bytes b'c'"),
    "nested": (pa.table({"instruction": ["a"], "output": [{"b": "c"}]}), "row 1: output is dict {'b': 'c'}"),
    "a date that Python has not": (
        pa.table({"instruction": ["a"], "output": pa.array([2**31 - 1], pa.date32())}),
        "row 1: a date32[day] that cannot be read (days=2147483647",
    ),
    "text that is not UTF-8": (
        pa.table(
            {
                "instruction": ["a", "b"],
                "output": pa.Array.from_buffers(
                    pa.string(),
                    2,
                    [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"c\xff")],
                ),
            }
        ),
        "row 2: a string that cannot be read ('utf-8' codec",
    ),
    "missing": (pa.table({"text": ["a"]}), "no column 'instruction'"),
    "no rows": (
        pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())}),
        "no rows",
    ),
    "a column twice": (
        pa.table(
            [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["instruction", "output", "output"]
        ),
        "column 'output' stands twice",
    ),
}


@pytest.mark.parametrize(("table", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_parquet_table_is_refused_with_its_row(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError) as error:
        read_columns(str(path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows.json").mkdir()
    for source, message in {
        str(tmp_path / "none.jsonl"): "no such file",
        str(tmp_path / "none"): "no such file",
        "./none": "no such file",
        "../a/b/none.csv": "no such file",
        str(tmp_path / "rows"): "a folder. Name one file in it",
        str(tmp_path / "rows.json"): "a folder. Name one file in it",
    }.items():
        with pytest.raises(DataError, match=message):
            read_columns(source)


@pytest.mark.timeout(60)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pipe, device = tmp_path / "rows.jsonl", tmp_path / "zero.csv"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for source in (str(pipe), str(device)):
        with pytest.raises(DataError, match=r"a pipe or a device, no file. Write the rows into a file first"):
            read_columns(source)
        with pytest.raises(DataError, match="a pipe or a device"):
            prepare_dataset(source, tokenizer, 64, cache_root=tmp_path)


@pytest.mark.parametrize(
    "source", ["x" * 5000, "x" * 300 + ".json", "~nobody-here/rows.json", "csv/" + "x" * 300, "~\0"]
)
def test_a_name_that_no_file_can_have_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    with pytest.raises(DataError, match=f"^{source}: "):
        read_columns(source)
    with pytest.raises(DataError, match=f"^{source}: "):
        prepare_dataset(source, tokenizer, 64, cache_root=tmp_path)


@pytest.mark.parametrize("name", ["csv", "json", "parquet", "text"])
def test_a_kind_of_file_is_no_name_and_takes_no_files_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    as_csv(tmp_path / "somebody_elses", ALPACA)
    with pytest.raises(DataError, match=f"'{name}': no dataset's name. Expected a .json"):
        read_columns(name)


def test_a_file_that_may_not_be_read_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ALPACA)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    for use in (
        lambda: read_columns(path),
        lambda: prepare_dataset(path, tokenizer, 64, cache_root=tmp_path),
    ):
        with pytest.raises(DataError, match=r"rows.jsonl: cannot be read \(.*Permission denied"):
            use()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["instruction", "input", "context", "output", "response", "text"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
pieces = st.sampled_from(
    b'[ ] { } " , : \n \r \0 \xff \xef\xbb\xbf \xe2\x80\xa8 1e999 instruction,output "instruction":"a" "output":"b"'.split(
        b" "
    )
)


@given(
    st.one_of(
        st.binary(max_size=40),
        st.lists(pieces, max_size=12).map(b"".join),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.lists(json_values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
    st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_of_a_file_raises_anything_but_data_error(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = write(tmp_path / f"rows{suffix}", content)
    try:
        columns = read_columns(path)
    except DataError as error:
        named = str(error).startswith(path)
    else:
        named = True
        for column in (columns.instruction, columns.input, columns.output):
            assert len(column) == len(columns) > 0
            assert {type(value) for value in column} == {str}
    assert named


@given(st.integers(0, 2000), st.integers(0, 255))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_parquet_file_raises_nothing_but_data_error(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "good.parquet"
    if not path.exists():
        as_parquet(path, ALPACA)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    with contextlib.suppress(DataError):
        read_columns(write(tmp_path / "bad.parquet", bytes(content)))
