"""Sources as other programs write them: folders of parts, JSON in its many forms, compressed files, missing values."""

from __future__ import annotations

import gzip
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import jsonl, rows_of, write
from training.data.formats import suffix_of
from training.data.ledger import Ledger
from training.data.rows import Columns, local_files, read_columns
from training.data.tokens import prepare_dataset
from training.errors import DataError

ROWS = rows_of(4)
READ = Columns([f"Say {n}." for n in range(4)], [""] * 4, list("0123"))
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def refusal(source: Path) -> str:
    """The message that refuses a source, without the folder of the test."""
    with pytest.raises(DataError) as error:
        read_columns(str(source))
    assert str(error.value).startswith(f"{source}")
    return str(error.value).removeprefix(f"{source}").lstrip(":, ")


# --- JSON -----------------------------------------------------------------------------------------------


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


JSON_FORMS = {
    "an object with the list": ({"data": ROWS}, []),
    "an object with the list and more": ({"version": 1, "data": ROWS}, ["'version' beside 'data'"]),
    "splits": ({"test": ROWS[:1], "train": ROWS}, ["'test' beside 'train'"]),
    "columns": (columns_of(ROWS), []),
    "columns and a column more": (columns_of(ROWS) | {"n": [1] * 4}, ["the column 'n'"]),
    "columns by index, as pandas writes them": (
        {name: {str(i): text for i, text in enumerate(column)} for name, column in columns_of(ROWS).items()},
        [],
    ),
    "rows by index, as pandas writes them": ({str(i): row for i, row in enumerate(ROWS)}, []),
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(("value", "not_read"), JSON_FORMS.values(), ids=JSON_FORMS)
def test_a_json_object_that_holds_rows_is_read(
    tmp_path: Path, value: Any, not_read: list[str], indent: int | None
) -> None:
    columns = read_columns(write(tmp_path / "x.json", json.dumps(value, indent=indent)))
    assert columns == READ
    assert columns.not_read == not_read


def test_objects_one_after_the_other_and_a_single_object_are_rows(tmp_path: Path) -> None:
    for between in ("\n", "", "\n\n", " "):
        text = between.join(json.dumps(row, indent=2) for row in ROWS)
        assert read_columns(write(tmp_path / "x.json", text)) == READ
    joined = LINES.replace("}\n", "}", 1)  # two files, joined: the first ends without a line break
    assert read_columns(write(tmp_path / "x.jsonl", joined)) == READ
    assert read_columns(write(tmp_path / "x.json", json.dumps(ROWS[0], indent=1))).output == ["0"]


ONE_LINE = json.dumps(ROWS)
JSON_FAULTS = {
    "the line, column and row of a list": (
        ONE_LINE.replace("Say 2", 'Say "2'),
        "line 1: broken JSON: Expecting ',' delimiter at column 134 in row 3",
    ),
    "a comma too many": (f"{ONE_LINE[:-1]},\n]", "line 2: broken JSON: Expecting value at column 1 in row 5"),
    "a key twice in a list": ('[{"a": 1}, {"a": 1, "a": 2}]', "column 'a' appears twice in row 2"),
    "a key twice among very many": (
        json.dumps(dict.fromkeys(range(200_000)))[:-1] + ', "199999": 2}',
        "column '199999' appears twice",
    ),
    "a list and more": (f"{ONE_LINE}\n{ONE_LINE}]", "line 2: broken JSON: Extra data at column 1"),
    "a tab in a string": (
        LINES.replace("Say 1", "Say\t1"),
        "line 2: broken JSON: Invalid control character at column 21. Write a tab as \\t and a line break as \\n",
    ),
    "all broken lines": (
        LINES + "{\n" * 12,
        ". 12 lines are like this; the first: 5, 6, 7, 8, 9, 10, 11, 12, 13, 14",
    ),
    "an object over several lines": ('{\n "instruction": "a"\n "output": 1}', "line 3: broken JSON: Expecting ','"),
    "several lists": (json.dumps({"a": ROWS, "b": ROWS}), "holds the lists 'a', 'b'; expected one list of rows. Take one out: jq '.[\"a\"]' "),
    "an object without rows": ('{"version": {"a": 1}}', "holds one object with 'version'; expected a list of rows"),
    "columns of two lengths": (
        '{"instruction": ["a", "b"], "output": ["c"]}',
        "the columns differ in length: 'instruction' 2, 'output' 1 values",
    ),
    "columns of two indices": (
        '{"instruction": {"0": "a"}, "output": {"1": "c"}}',
        "the columns 'instruction', 'output' have different indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_a_fault_in_json_is_reported_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(Path(write(tmp_path / "x.json", content)))


# --- bytes ----------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


CSV = "instruction,input,output\n" + "".join(f"Say {n}.,,{n}\n" for n in range(4))
ENCODED = {
    "gzip": ("x.jsonl.gz", gzip.compress(LINES.encode())),
    "two gzip files in one": ("x.JSONL.GZ", gzip.compress(LINES[:60].encode()) + gzip.compress(LINES[60:].encode())),
    "gzip in disguise": ("x.json", gzip.compress(ONE_LINE.encode())),
    "no gzip in spite of its name": ("x.jsonl.gz", LINES.encode()),
    "zstd": ("x.csv.zst", zstd(CSV.encode())),
    "zstd in disguise": ("x.csv", zstd(CSV.encode("utf-8-sig"))),
    "UTF-16": ("x.csv", CSV.encode("utf-16")),
    "UTF-32 in gzip": ("x.json.gz", gzip.compress(ONE_LINE.encode("utf-32"))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), ENCODED.values(), ids=ENCODED)
def test_compressed_files_and_utf_16_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    assert read_columns(write(tmp_path / name, content)) == READ


def test_parquet_is_recognised_by_its_content_also_in_gzip(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.json")
    assert read_columns(str(tmp_path / "x.json")) == READ
    compressed = gzip.compress((tmp_path / "x.json").read_bytes())
    assert read_columns(write(tmp_path / "x.parquet.gz", compressed)) == READ


DISGUISES = {
    "Git LFS": ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the "
                "file itself. Type git lfs pull in its repository"),
    "HTML": ("x.json", b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", "an HTML page, not data. Download the raw file"),
    "HTML without a type": ("x.jsonl", b"<HTML lang='en'>", "an HTML page"),
    "Excel": ("x.csv", b"PK\3\4\x14\0", "a ZIP archive or an Excel file"),
    "half of a gzip": ("x.jsonl.gz", gzip.compress(LINES.encode())[:-9], "broken gzip"),
    "damaged gzip": ("x.jsonl", b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"no gzip", "broken gzip"),
    "half of a zstd": ("x.jsonl.zst", zstd(LINES.encode())[:-9], "broken zstd"),
    "gzip in zstd": ("x.jsonl.gz.zst", zstd(gzip.compress(LINES.encode())), "compressed twice. Unpack it once"),
    "another compression": ("x.jsonl.bz2", b"BZh9", "cannot read '.bz2' files"),
    "bzip2 in disguise": ("x.jsonl", b"BZh91AY&SY", "compressed with bzip2"),
    "quotes as Spark escapes them": ("x.csv", b'instruction,output\n"a \\"b\\", c",d\n', "(Spark: option('escape', '\"'))"),
    "semicolons": ("x.csv", b"instruction;input;output\na;b;c\n", "Found 'instruction;input;output'. Separate the fields with "
                   "commas, not ';'"),
    "tabs": ("x.csv", b"instruction\toutput\na\tb\n", "Separate the fields with commas, not '\\t'"),
    "ragged rows": ("x.csv", b"instruction,output\na,b\nc\nd,e\nf,g,h\n", "line 3: 1 fields, but the header has 2. 2 lines "
                    "are like this; the first: 3, 5"),
}  # fmt: skip


@pytest.mark.parametrize(
    "url", ["s3://bucket/rows.jsonl", "https://host/rows.csv?raw=1", "hf://datasets/a/b/c.json"]
)
def test_a_url_is_refused_with_what_to_do(url: str) -> None:
    with pytest.raises(
        DataError, match=r"is a URL\. Copy it to a local file or folder, and name that"
    ) as error:
        read_columns(url)
    assert str(error.value).startswith(url)


def test_a_path_of_databricks_file_system_is_its_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^/dbfs/data/rows\.jsonl: no such file"):
        read_columns("dbfs:/data/rows.jsonl")


@pytest.mark.parametrize(("name", "content", "message"), DISGUISES.values(), ids=DISGUISES)
def test_a_file_that_is_not_what_its_name_says_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    assert message in refusal(Path(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (b"PAR1\x15", ".parquet"),
        (b"\xef\xbb\xbf\n [{}]", ".json"),
        (b'{"a": 1}', ".json"),
        (gzip.compress(b'{"a": 1}', mtime=0), ".json"),
        ("[{}]".encode("utf-16"), ".json"),
        (b"a,b", ".csv"),
    ],
)
def test_the_suffix_of_a_file_is_detected_from_its_content(content: bytes, suffix: str) -> None:
    assert suffix_of(content, ".csv") == suffix


# --- missing values, numbers and other columns ----------------------------------------------------------

# Rows 1 and 2 are good. In the others a value is missing.
WITH_GAPS = [
    {"instruction": "a", "input": " \n", "output": "b", "weight": 1},
    {"instruction": "c", "input": float("nan"), "output": "d"},
    {"instruction": "e", "input": "", "output": None},
    {"instruction": None, "input": None, "output": "f"},
    {"instruction": "g", "input": "", "output": float("nan")},
    {"instruction": "\t", "input": "h", "output": "i"},
    {"input": "k", "output": "l"},
    {"instruction": "m", "input": "", "output": "\u3000"},
    {"instruction": "n", "history": [["o", "p"]]},
]


def test_what_is_missing_is_dropped_and_reported_whatever_it_looks_like(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for name in ("null.jsonl", "nan.json"):
        text = jsonl if name == "null.jsonl" else lambda path, rows: write(path, json.dumps({"data": rows}))
        rows, ledger = prepare_dataset(
            text(tmp_path / name, WITH_GAPS), tokenizer, 256, False, 1, tmp_path / name[:3]
        )
        assert rows["row"][:] == [1, 2]
        assert ledger.first_dropped_rows == {"empty response": [3, 5, 8, 9], "empty instruction": [4, 6, 7]}
        assert ledger.not_read == ["the columns 'weight', 'history'"]
        assert "\n  not read: the columns 'weight', 'history'\n" in str(ledger)
        for row in rows["input_ids"]:  # a blank input is none
            assert "paired with an input" not in tokenizer.decode(row)


def test_missing_values_of_parquet_are_dropped_like_those_of_json(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    table = pa.table(
        {"instruction": ["a", None, "b", "c"], "output": pa.array([1.5, 2.0, float("nan"), None])}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    _, ledger = prepare_dataset(str(tmp_path / "x.parquet"), tokenizer, 256, False, 1, tmp_path / "cache")
    assert ledger.first_dropped_rows == {"empty response": [3, 4], "empty instruction": [2]}


def test_numbers_and_booleans_are_read_as_their_text(tmp_path: Path) -> None:
    long = "9" * 5000
    lines = [f'{{"instruction": 7, "output": {value}}}' for value in ("7", "7.50", "-1e5", "true", long)]
    columns = read_columns(write(tmp_path / "x.jsonl", "\n".join(lines)))
    assert columns.output == ["7", "7.50", "-1e5", "true", long]
    assert columns.instruction == ["7"] * 5
    assert {type(text) for text in columns.output} == {str}
    for values, texts in (
        (pa.array([3, -4]), ["3", "-4"]),
        (pa.array([0.1, None], pa.float32()), ["0.1", ""]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array(["1", "2"]).dictionary_encode(), ["1", "2"]),
        (pa.array([1, 2]).dictionary_encode(), ["1", "2"]),
    ):
        table = pa.table({"instruction": ["a", "b"], "output": values})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert read_columns(str(tmp_path / "x.parquet")).output == texts


def test_a_refusal_lists_its_first_ten_rows_and_their_number(tmp_path: Path) -> None:
    more = ". 12 rows are like this; the first: 5, 6, 7, 8, 9, 10, 11, 12, 13, 14"
    for row, message in {
        '{"instruction": "a", "output": ["b"]}': "row 5: output is list ['b'], expected a string",
        '{"instruction": "\\ud83d", "output": ""}': "row 5: instruction has half of a surrogate pair",
        "[]": "row 5: list [] is not an object with named columns",
    }.items():
        assert refusal(Path(write(tmp_path / "x.jsonl", LINES + f"{row}\n" * 12))) == message + more


def test_a_column_named_text_is_left_out_in_silence_only_if_it_is_the_rendered_row(tmp_path: Path) -> None:
    rendered = [
        row | {"text": f"### Instruction: {row['instruction']} ### Response: {row['output']}"} for row in ROWS
    ]
    assert read_columns(jsonl(tmp_path / "x.jsonl", rendered)).not_read == []
    article = [row | {"text": "An article."} for row in ROWS]
    assert read_columns(jsonl(tmp_path / "x.jsonl", article)).not_read == ["the column 'text'"]
    twice = pa.Table.from_pylist(rendered).append_column("text", [["An article."] * 4])
    pyarrow.parquet.write_table(twice, tmp_path / "x.parquet")
    assert read_columns(str(tmp_path / "x.parquet")).not_read == ["the column 'text'"]


OTHER_SHAPES = {
    "messages by another name": (
        [{"dialog": [{"role": "user", "content": "a"}]}],
        "its rows are conversations (column 'dialog'). Rename it to 'messages'",
    ),
    "messages in capitals": ([{"Messages": []}], "(column 'Messages'). Rename it to 'messages'"),
    "single messages": ([{"role": "user", "content": "a"}], "its rows are single messages. Write each conversation"),
    "prompt and completion": (
        [{"prompt": "a", "completion": "b"}],
        "Found 'prompt', 'completion'; expected instruction and output (as in Alpaca; input is optional), or "
        "instruction and response (as in dolly-15k; context is optional), or messages (conversations). Rename 'prompt' to 'instruction' and "
        "'completion' to 'output'",
    ),
    "columns of other names": (
        {"instructions": ["a", "b"], "inputs": ["c", "d"], "outputs": ["e", "f"]},
        "Found 'instructions', 'inputs', 'outputs'; expected",
    ),
    "capitals": ([{"Instruction": "a", "Response": "b"}], "Rename 'Instruction' to 'instruction' and 'Response'"),
    "a row as the header": ([{"x" * 90: "a"}], f"Found '{'x' * 36}...; expected"),
    "many columns": ([{f"c{n}": 1 for n in range(30)}], "'c19' and 10 more; expected"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_rows_of_another_shape_are_refused_with_what_was_found(
    tmp_path: Path, rows: Any, message: str
) -> None:
    assert message in refusal(Path(write(tmp_path / "x.json", json.dumps(rows))))


# --- folders --------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    write(path, "\n".join([",".join(names), *(",".join(row[name] for name in names) for row in rows)]))


def json_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))


Parts = dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]]


def folder_of(folder: Path, parts: Parts) -> Path:
    for name, (writer, rows) in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        writer(folder / name, rows)
    return folder


@pytest.mark.parametrize(
    ("suffix", "writer"),
    [("snappy.parquet", parquet), ("json", jsonl), ("csv", csv), ("jsonl", jsonl), ("json.gz", json_gz)],
)
def test_a_folder_of_parts_is_one_dataset_in_order_of_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, suffix: str, writer: Callable[..., Any]
) -> None:
    gap = [ROWS[3] | {"output": ""}]
    parts = {
        f"part-0000{part}-tid.{suffix}": (writer, rows) for part, rows in ((2, gap), (0, ROWS), (1, ROWS[:2]))
    }
    folder = folder_of(tmp_path / "rows.parquet", parts)
    for name in ("_SUCCESS", f".part-00000.{suffix}.crc", f"_hidden.{suffix}"):
        write(folder / name, b"x")
    columns = read_columns(str(folder))
    assert columns.instruction == [row["instruction"] for row in (*ROWS, *ROWS[:2], ROWS[3])]
    assert columns.not_read == []
    _, ledger = prepare_dataset(str(folder), tokenizer, 256, False, 1, tmp_path / "cache")
    names = sorted(parts)
    assert ledger.files == dict(zip(names, (4, 2, 1), strict=True))
    assert ledger.first_dropped_rows == {"empty response": [7]}
    assert f"\n  from 3 files: {names[0]} to {names[2]}\n" in str(ledger)
    assert f"dropped 1: empty response (first rows: {names[2]} row 1)" in str(ledger)
    assert Ledger(**json.loads(json.dumps(vars(ledger)))) == ledger


def test_a_changed_part_of_a_folder_is_tokenised_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = folder_of(tmp_path / "rows", {"a.jsonl": (jsonl, ROWS), "b.jsonl": (jsonl, ROWS)})
    kept = []
    for change in (None, "b.jsonl", "c.jsonl"):
        if change:
            jsonl(folder / change, ROWS[:3])
        kept.append(prepare_dataset(str(folder), tokenizer, 256, cache_root=tmp_path / "cache")[1].rows_kept)
    assert kept == [8, 7, 10]


def test_a_folder_may_have_more_parts_than_a_process_may_open(tmp_path: Path) -> None:
    parts = {f"part-{n:05}.parquet": (parquet, ROWS[:1]) for n in range(80)}
    folder = folder_of(tmp_path / "rows", parts)
    read_columns(str(folder))  # imports what it needs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert len(read_columns(str(folder))) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_spark_writes_empty_parts_leaves_out_nulls_and_makes_folders_of_partitions(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "rows",
        {
            "topic=b/part-0.json": (jsonl, [{"instruction": "c", "output": "d"}]),
            "topic=a/part-0.json": (jsonl, [{"instruction": "a", "input": "x", "output": "b"}]),
            "topic=a/part-1.json": (write, b""),
        },
    )
    columns = read_columns(str(folder))
    assert columns == Columns(["a", "c"], ["x", ""], ["b", "d"])
    assert columns.files == {"topic=a/part-0.json": 1, "topic=b/part-0.json": 1}


def test_the_split_train_of_a_folder_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "rows",
        {
            "train-00000-of-00002.parquet": (parquet, ROWS[:2]),
            "train-00001-of-00002.parquet": (parquet, ROWS[2:]),
            "test-00000-of-00001.parquet": (parquet, ROWS),
            "README.md": (write, b"# Rows"),
            "dataset_infos.json": (write, b"{}"),
        },
    )
    columns = read_columns(str(folder))
    assert columns == READ
    assert columns.not_read == ["the files 'README.md', 'test-00000-of-00001.parquet'"]
    assert [name[:5] for name in local_files(str(folder)) or {}] == ["train", "train"]


def test_a_folder_that_spark_partitioned_by_split_gives_the_split_train(tmp_path: Path) -> None:
    names = ("split=test/part-0.json", "split=train/part-0.json")
    folder = folder_of(tmp_path / "rows", dict.fromkeys(names, (jsonl, ROWS)))
    columns = read_columns(str(folder))
    assert columns == READ
    assert columns.not_read == ["the file 'split=test/part-0.json'"]


def test_a_link_to_a_folder_around_it_is_refused_because_its_rows_would_be_read_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", {"a=1/part-0.json": (jsonl, ROWS)})
    for link in ("b=1", "b=2"):  # each would double the files at every level
        (folder / "a=1" / link).symlink_to(folder)
    assert "a=1/b=1: is a link to a folder that it is in. Remove it" in refusal(folder)
    other = folder_of(tmp_path / "other", {"a.json": (jsonl, ROWS)})
    (other / "c=1").symlink_to(folder)
    (folder / "a=1" / "b=1").unlink()
    (folder / "a=1" / "b=2").unlink()
    (folder / "a=1" / "b=1").symlink_to(other)
    assert "a=1/b=1/c=1: is a link to a folder that it is in" in refusal(folder)


def test_a_folder_of_one_split_is_read_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", {f"my_test_{n}.json": (jsonl, ROWS[n:n + 2]) for n in (0, 2)})  # fmt: skip
    assert read_columns(str(folder)) == READ


BAD_FOLDERS: dict[str, tuple[Parts, str]] = {
    "two kinds": (
        {"a.csv": (csv, ROWS), "a.jsonl": (jsonl, ROWS)},
        "has files of several kinds (.csv, .jsonl), which may hold the same rows. Name one file",
    ),
    "packed and unpacked": (
        {"a.json.gz": (json_gz, ROWS), "a.json": (jsonl, ROWS)},
        "has files of several kinds (.json, .json.gz)",
    ),
    "only splits for tests": (
        {"test.csv": (csv, ROWS), "validation.csv": (csv, ROWS)},
        "has files of a split for tests, and none of the split train (test.csv, validation.csv)",
    ),
    "a folder inside": (
        {"a.csv": (csv, ROWS), "data/b.csv": (csv, ROWS)},
        "has data files in folders inside (data). Name one folder",
    ),
    "other columns": (
        {"a.csv": (csv, ROWS), "b.csv": (csv, [{"instruction": "a", "output": "b"}])},
        "b.csv: has the columns 'instruction', 'output', but a.csv has 'instruction', 'input', 'output'",
    ),
    "rows of another shape": (
        {"a.jsonl": (jsonl, ROWS * 20), "b.jsonl": (jsonl, [{"prompt": "a", "completion": "b"}])},
        "b.jsonl: no column 'instruction' and no column 'output' or 'response'. Found 'prompt', 'completion'",
    ),
    "a bad row": (
        {"a.jsonl": (jsonl, ROWS), "b.jsonl": (jsonl, [*ROWS, {"instruction": "a", "output": {}}])},
        "b.jsonl, row 5: output is dict {}, expected a string",
    ),
    "a Delta table": (
        {"a.parquet": (parquet, ROWS), "_delta_log/0.json": (write, b"{}")},
        "is a Delta table, whose files also hold rows that were deleted",
    ),
    "nothing": ({"README.md": (write, b"#")}, "a folder without data files. Expected .json, .jsonl, .csv"),
    "no rows": (
        {"a.jsonl": (write, b"\n"), "b.jsonl": (write, b"")},
        "no rows. Name a file or a dataset that has some",
    ),
}


@pytest.mark.parametrize(("parts", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_is_not_one_dataset_is_refused(tmp_path: Path, parts: Parts, message: str) -> None:
    assert message in refusal(folder_of(tmp_path / "rows", parts)).lstrip("/")


def test_a_folder_that_save_to_disk_wrote_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict(test=data, dev=data).save_to_disk(str(tmp_path / "none"))
    assert read_columns(str(tmp_path / "one")) == READ
    assert read_columns(str(tmp_path / "two")) == READ
    _, ledger = prepare_dataset(str(tmp_path / "two"), tokenizer, 256, cache_root=tmp_path / "cache")
    assert ledger.not_read == ["the split 'test'"]
    assert refusal(tmp_path / "none").startswith(
        "has the splits 'test', 'dev', and no train. Name the folder"
    )
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert refusal(tmp_path / "one").startswith(
        "was written by save_to_disk of datasets, but cannot be loaded"
    )


# --- a part of a dataset on the Hub ---------------------------------------------------------------------


def test_revision_configuration_and_split_of_a_hub_dataset_are_passed_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def load(path: str, /, **arguments: str) -> datasets.Dataset:
        requests.append(arguments)
        split = arguments["split"]
        if split == "tset":
            raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")
        if split == "two":
            raise ValueError(
                "Config name is missing. Please pick one among the available configs: ['en', 'fr']"
            )
        if split == "old":
            raise datasets.exceptions.DatasetNotFoundError(
                "Revision 'v9' doesn't exist for dataset 'a/b' on the Hub."
            )
        data = datasets.Dataset.from_list(ROWS if split == "train" else ROWS[:2])
        data.info.splits = datasets.SplitDict.from_split_dict(
            {"train": {"name": "train"}, "test": {"name": "test"}}
        )
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    selection = {"config": "en", "split": "test", "revision": "v1"}
    for chosen, kept, other in ((None, 4, "test"), (selection, 2, "train")):
        _, ledger = prepare_dataset("a/b", tokenizer, 256, cache_root=tmp_path, selection=chosen)
        assert ledger.rows_kept == kept
        assert ledger.not_read == [f"the split {other!r}"]
    assert requests == [{"split": "train"}, {"name": "en", "split": "test", "revision": "v1"}]
    for wrong, advice in (
        ({"split": "tset"}, r"one of \['train', 'test'\]..\. Choose one with --dataset-split"),
        ({"split": "two"}, r"available configs: \['en', 'fr'\]\)\. Choose one with --dataset-config"),
        ({"split": "old"}, r"'v9' doesn't exist.*\. Choose one with --dataset-revision"),
    ):
        with pytest.raises(DataError, match=advice):
            read_columns("a/b", wrong)


def test_a_part_of_a_local_source_is_refused_because_it_would_be_ignored(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for source in (jsonl(tmp_path / "x.jsonl", ROWS), str(tmp_path), "demo"):
        for use in (
            lambda source: read_columns(source, {"split": "test", "revision": "v1"}),
            lambda source: prepare_dataset(
                source, tokenizer, 64, selection={"split": "test", "revision": "v1"}
            ),
        ):
            with pytest.raises(DataError, match="--dataset-split and --dataset-revision would be ignored"):
                use(source)
