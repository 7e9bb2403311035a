"""Fuzzed data files give the right ids and masks, or an error that says what is wrong.

Results are checked against this file's own parser, its own copy of the prompt and a plain byte-pair encoder without
control tokens. The expected values never come from `training`.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase

from tests.conftest import EOS
from tests.options.test_fuzz import CONTROL, cases, fuzz
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.data.ledger import Ledger
from training.data.rows import read_columns
from training.data.tokens import prepare_dataset
from training.errors import DataError, printable

pytestmark = pytest.mark.timeout(600)  # a hang is a failure too

Row = tuple[str, str, str]  # instruction, input, output

# --- the oracle --------------------------------------------------------------------------------------


def prompt_pieces(instruction: str, input: str) -> tuple[str, str, str, str]:
    """The parts of the prompt: text, instruction key, text, response key."""
    input = input if input.strip() else ""
    paired = ", paired with an input that provides further context" if input else ""
    request = "Write a response that appropriately completes the request."
    head = f"Below is an instruction that describes a task{paired}. {request}\n\n"
    body = f"\n{instruction}\n\n### Input:\n{input}\n\n" if input else f"\n{instruction}\n\n"
    return head, "### Instruction:", body, "### Response:\n"


@dataclass
class Oracle:
    """Expected ids and masks of rows, from a plain byte-pair encoder and the ids of the three control tokens."""

    bpe: ByteLevelBPETokenizer
    control: dict[str, int]
    eos: int
    cache: dict[Row, tuple[list[int], int]] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids if text else []

    def expected(self, row: Row) -> tuple[list[int], int]:
        """(ids, index of the first response token) of a row, without truncation."""
        if row not in self.cache:
            head, key, body, response = prompt_pieces(row[0], row[1])
            prompt = [*self.encode(head), self.control[key], *self.encode(body), self.control[response]]
            ids = [*prompt, *self.encode(f"{row[2]}\n\n"), self.control["### End"]]
            self.cache[row] = ids, len(prompt)
        return self.cache[row]

    def text(self, ids: list[int]) -> str:
        words = {number: word for word, number in self.control.items()}
        text = ""
        for control, group in itertools.groupby(ids, key=lambda i: i in words):
            part = list(group)
            text += "".join(words[i] for i in part) if control else self.bpe.decode(part, False)
        return text

    def check(
        self, rows: list[Row], prepared: datasets.Dataset, ledger: Ledger, longest: int, keep: bool
    ) -> None:
        dropped: dict[str, list[int]] = {}
        kept: dict[int, tuple[list[int], int]] = {}
        cut = 0
        for number, row in enumerate(rows, start=1):
            ids, start = self.expected(row)
            if not row[2].strip():
                dropped.setdefault("empty response", []).append(number)
            elif not row[0].strip():
                dropped.setdefault("empty instruction", []).append(number)
            elif start >= longest:
                dropped.setdefault("prompt alone fills max_length", []).append(number)
            elif len(ids) > longest and not keep:
                dropped.setdefault("response would be cut at max_length", []).append(number)
            else:
                cut += len(ids) > longest
                kept[number] = ids[:longest], start
        assert prepared["row"][:] == list(kept)
        assert (ledger.rows_read, ledger.rows_kept, ledger.rows_truncated) == (len(rows), len(kept), cut)
        assert ledger.dropped == {reason: len(numbers) for reason, numbers in dropped.items()}
        assert ledger.first_dropped_rows == {reason: numbers[:10] for reason, numbers in dropped.items()}
        assert ledger.rows_kept + sum(ledger.dropped.values()) == len(rows)
        assert ledger.tokens == sum(len(ids) for ids, _ in kept.values())
        assert ledger.response_tokens == sum(len(ids) - start for ids, start in kept.values())
        assert ledger.longest_row == max((len(ids) for ids, _ in kept.values()), default=0)
        assert sum(ledger.length_histogram.values()) == len(kept)
        features = prepared.to_list()
        for feature, (number, (ids, start)) in zip(features, kept.items(), strict=True):
            assert feature["input_ids"] == ids
            assert (feature["response_spans"], feature["length"]) == ([[start, len(ids)]], len(ids))
            row = rows[number - 1]
            self.check_row(row, ids, start, complete=len(self.expected(row)[0]) <= longest)
        self.check_labels(features)

    def check_row(self, row: Row, ids: list[int], start: int, complete: bool) -> None:
        end, instruction, response = (self.control[word] for word in CONTROL)
        special = {end, instruction, response, self.eos}
        assert self.text(ids[:start]) == "".join(prompt_pieces(row[0], row[1]))
        assert ids[start - 1] == response
        assert [i for i in ids[:start] if i in special] == [instruction, response]
        if complete:
            assert self.text(ids[start:]) == f"{row[2]}\n\n### End"
            assert [i for i in ids[start:] if i in special] == ids[-1:] == [end]

    def check_labels(self, features: list[dict[str, Any]]) -> None:
        starts = [(row["input_ids"], row["response_spans"][0][0]) for row in features]
        expected = [[-100] * start + ids[start:] for ids, start in starts]
        packed = DataCollatorForPackedRows(self.eos)(features)
        assert packed["labels"][0].tolist() == [i for row in expected for i in row]
        assert packed["shift_labels"][0].tolist() == [i for row in expected for i in row if i != -100]
        padded = DataCollatorForCompletionOnlyLM(self.eos)(features)["labels"].tolist()
        for labels, row in zip(padded, expected, strict=True):
            assert labels[: len(row)] == row
            assert set(labels[len(row) :]) <= {-100}


@pytest.fixture(scope="module")
def oracle(bpe_folder: Path) -> Oracle:
    bpe = ByteLevelBPETokenizer.from_file(str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt"))
    vocabulary = json.loads((bpe_folder / "vocab.json").read_text())
    control = {word: len(vocabulary) + number for number, word in enumerate(CONTROL)}
    return Oracle(bpe, control, vocabulary[EOS])


# --- files -------------------------------------------------------------------------------------------


@dataclass
class File:
    """A generated file: name, bytes and the expected result.

    `rows` are the expected rows. `location` is what an error must name after the path. A file with neither is also
    parsed here: one of the two parsers may refuse it, but they must not give different rows.
    """

    name: str
    content: bytes
    rows: list[Row] | None = None
    location: str | None = None


SCRAPS = (
    "### End", "### Response:\n", "### Response:", "### Instruction:", "### Input:", "\n\n### End\n\n", "#", "###",
    EOS, "<|extratoken_1|>", "\0", "\r\n", "\r", "\n", "\t", " ", "\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\xa0",
    "\u200b", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff", "é", "e\u0301", "ﬁ", "＃＃＃ End", "😀", "👩\u200d🚀", "日本語",
    "א", "\u202e", "«", "»", '"', '""', ",", ";", "'", "\\", "\\u0000", "{", "}", "[", "null", "NaN", "{{x}}",
    "{% x %}", "%s", "a", "b", "Add.", "1 2",
)  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(SCRAPS), min_size=1, max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["Name a colour.", "Red.", "x" * 300, "word " * 60, " \n\t", "\u3000", ""]),
)
tables = st.lists(st.tuples(texts, texts | st.just(""), texts), min_size=1, max_size=8)
stems = st.sampled_from(
    ["my rows", *"rows zeilen-ä 行 a:b x#y?z 100%s [1] * a'b -rows rows.json {x}".split()]
)
names = st.sampled_from([("instruction", "input", "output"), ("instruction", "context", "response")])
kinds = st.sampled_from(["json", "jsonl", "csv", "parquet"])
COMPRESSIONS = ("snappy", "zstd", "none")


def as_objects(draw: Any, rows: list[Row], columns: tuple[str, str, str], nulls: bool = True) -> list[dict]:
    """Rows as JSON or Parquet objects: with extra columns, and an empty input possibly null or left out."""
    objects = []
    for row in rows:
        fields = dict(zip(columns, row, strict=True)) | {"text": 7, "n": [None]}
        if nulls and not row[1]:
            fields |= draw(st.sampled_from([{}, {columns[1]: None}]))
        objects.append(fields)
    return objects


def json_text(draw: Any, objects: list[dict], **options: Any) -> str:
    """A list, an object with the list, columns, or objects one after the other."""
    form = draw(st.sampled_from(["list", "data", "columns", "stream"]))
    names = {name: None for item in objects for name in item}
    columns = {name: [item.get(name) for item in objects] for name in names}
    value = {"list": objects, "data": {"version": 1, "data": objects}, "columns": columns}.get(form)
    return (
        " ".join(json.dumps(item, **options) for item in objects)
        if value is None
        else json.dumps(value, **options)
    )


COMPRESSED = (
    (bytes, ""),
    (gzip.compress, ".gz"),
    (lambda content: pa.Codec("zstd").compress(content, asbytes=True), ".zst"),
)


def csv_bytes(lines: list[list[str]], quoting: int = csv.QUOTE_ALL, end: str = "\n") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=quoting, lineterminator=end).writerows(lines)
    return text.getvalue().encode()


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@st.composite
def good_files(draw: Any) -> File:
    rows, columns, kind = draw(tables), draw(names), draw(kinds)
    if draw(st.booleans()) and not any(row[1] for row in rows):
        columns = (columns[0], "unread", columns[2])  # no input at all
    bom = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    suffix = draw(st.sampled_from([kind, kind.upper()]))
    ascii_only = draw(st.booleans())
    if kind == "json":
        objects = as_objects(draw, rows, columns)
        indent = draw(st.none() | st.just(1))
        content = bom + json_text(draw, objects, ensure_ascii=ascii_only, indent=indent).encode()
    elif kind == "jsonl":
        between = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]))
        lines = [json.dumps(item, ensure_ascii=ascii_only) for item in as_objects(draw, rows, columns)]
        content = bom + (between.join(lines) + draw(st.sampled_from(["", between]))).encode()
    elif kind == "csv":
        order = draw(st.permutations(range(4)))
        lines = [[[*columns, "text"][i] for i in order], *([[*row, "t"][i] for i in order] for row in rows)]
        content = bom + csv_bytes(lines, end=draw(st.sampled_from(["\n", "\r\n"])))
    else:
        fields = as_objects(draw, rows, columns)
        kinds_of_text = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
        strings, compression = draw(st.sampled_from(kinds_of_text)), draw(st.sampled_from(COMPRESSIONS))
        values = {name: pa.array([item[name] for item in fields], strings) for name in columns}
        content = parquet_bytes(pa.table(values), compression=compression)
    name = f"{draw(stems)}.{suffix}"
    packed, ending = draw(st.sampled_from(COMPRESSED))
    return File(name + draw(st.sampled_from(["", ending])), packed(content), rows=rows)


@st.composite
def faulty_files(draw: Any) -> File:
    """A good table with one fault in one row. The error must name that row, or its line."""
    rows = draw(st.lists(st.tuples(st.just("a"), st.just(""), st.just("b")), min_size=2, max_size=6))
    columns = draw(names)
    at = draw(st.integers(0, len(rows) - 1))
    column = draw(st.sampled_from([columns[0], columns[2]]))
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    stem = draw(stems)
    not_text = [float("inf"), [], ["a"], {}, {"a": {"b": [1]}}]
    value = draw(st.sampled_from(not_text))
    fault = draw(st.sampled_from(["value", "input", "surrogate", "twice", "no object", "broken", "parquet",
                                  "ragged", "quote", "nested", "latin", "bad text"]))  # fmt: skip
    if fault == "parquet":
        types = [("binary", b"b"), ("date32", 2**31 - 1)]
        kind, array = draw(st.sampled_from(types))
        values = {name: [item[name] for item in objects] for name in columns if name != column}
        array = pa.array([array] * len(rows), pa.type_for_alias(kind))
        return File(
            f"{stem}.parquet", parquet_bytes(pa.table(values | {column: array})), location=", row 1: "
        )
    if fault == "bad text":  # the row's text is not UTF-8
        blob = b"b" * at + b"\xff" + b"b" * (len(rows) - 1 - at)
        offsets = np.arange(len(rows) + 1, dtype=np.int32).tobytes()
        bad = pa.Array.from_buffers(pa.string(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(blob)])
        values = {name: pa.array([item[name] for item in objects]) for name in columns}
        content = parquet_bytes(pa.table(values | {column: bad}))
        return File(f"{stem}.parquet", content, location=f", row {at + 1}: ")
    if fault in ("ragged", "quote", "latin"):
        lines = [list(columns), *map(list, rows)]
        if fault == "ragged":
            lines[at + 1] = lines[at + 1] + ["x"] if draw(st.booleans()) else lines[at + 1][:-1]
            return File(f"{stem}.csv", csv_bytes(lines), location=f", line {at + 2}: ")
        content = csv_bytes(lines).split(b"\n")
        content[at + 1] += b'"x' if fault == "quote" else b"\xe9"
        return File(f"{stem}.csv", b"\n".join(content), location=f", line {at + 2}: ")
    listed = fault in ("value", "input", "surrogate", "no object") and draw(st.booleans())
    if fault == "value":
        objects[at][column] = value
    elif fault == "input":
        objects[at][columns[1]] = value
    elif fault == "surrogate":
        objects[at][column] = "\ud83d"
    elif fault == "no object":
        objects[at] = draw(st.sampled_from([[], ["a"], 7, "a", None, True]))
    lines = [json.dumps(item) for item in objects]
    broken = {
        "twice": lines[at][:-1] + f', "{column}": "c"}}',
        "broken": lines[at][: draw(st.integers(1, 20))],
        "nested": '{"a":' * 100_000,
    }
    # A list in the first line would turn the file into a JSON list followed by other lines.
    if listed or (fault == "no object" and isinstance(objects[0], list)):
        return File(f"{stem}.json", json.dumps(objects).encode(), location=f", row {at + 1}: ")
    if fault in broken:
        lines[at] = broken[fault]
        return File(f"{stem}.jsonl", "\n".join(lines).encode(), location=f", line {at + 1}: ")
    return File(f"{stem}.jsonl", "\n".join(lines).encode(), location=f", row {at + 1}: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["instruction", "input", "context", "output", "response", "text"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


PIECES = b'[ ] { } " , : \n \r \0 \xff \xef\xbb\xbf \xe2\x80\xa8 1e999 instruction,output "instruction":"a" "output":"b"'.split(
    b" "
)


@st.composite
def damaged_files(draw: Any) -> File:
    """A good file after damage: cut, changed, doubled, re-encoded, or replaced by arbitrary JSON or bytes."""
    source = draw(good_files())
    content = bytearray(source.content)
    position = draw(st.integers(0, max(0, len(content) - 1)))
    change = draw(
        st.sampled_from("cut byte insert swap encoding double json lines bytes pieces gzip suffix".split())
    )
    name = source.name
    if change == "cut":
        del content[position:]
    elif change == "byte":
        content[position : position + 1] = bytes([draw(st.integers(0, 255))])
    elif change == "insert":
        content[position:position] = draw(st.sampled_from(b'\0 \xff " , \n \r \xed\xa0\x80 { ]'.split(b" ")))
    elif change == "swap":
        end = draw(st.integers(position, len(content)))
        content[position:end] = content[position:end][::-1]
    elif change == "encoding":
        text = bytes(content).decode(errors="replace")
        to = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "cp037", "utf-7"]))
        content = bytearray(text.encode(to, errors="replace"))
    elif change == "double":
        content = content * 2
    elif change == "json":
        content = bytearray(json.dumps(draw(json_values)).encode())
    elif change == "lines":
        content = bytearray("\n".join(map(json.dumps, draw(st.lists(json_values, max_size=4)))).encode())
    elif change == "bytes":
        content = bytearray(draw(st.binary(max_size=60)))
    elif change == "pieces":
        content = bytearray(b"".join(draw(st.lists(st.sampled_from(PIECES), max_size=12))))
    elif change == "gzip":
        content[:0] = b"\x1f\x8b\x08\0"
    elif change == "suffix":
        suffixes = [".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ""]
        name = name.rsplit(".", 1)[0] + draw(st.sampled_from(suffixes))
    return File(name, bytes(content))


def parse_independently(path: Path) -> list[Row] | None:
    """Parses a file without `training.data.rows`. Returns None if it has no usable rows."""
    with suppress(Exception):
        content = unpacked(path.read_bytes())
        text = "" if content[:4] == b"PAR1" else content.decode(encoding_of(content))
        if content[:4] == b"PAR1":
            objects = pq.read_table(io.BytesIO(content)).to_pylist()
        elif path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".csv"):
            csv.field_size_limit(2**31 - 1)
            objects = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            objects = json_objects(text)
        found = {name for item in objects for name in item}
        [output] = found & {"output", "response"}
        inputs = found & {"input", "context"}
        names = ("instruction", inputs.pop() if inputs else "", output)
        assert "instruction" in found
        assert not inputs
        rows = [tuple(plain_text(item.get(name)) for name in names) for item in objects]
        if all(isinstance(text, str) for row in rows for text in row):
            return rows
    return None


def unpacked(content: bytes) -> bytes:
    if content[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=io.BytesIO(content)).read()
    if content[:4] == b"\x28\xb5\x2f\xfd":
        return pa.input_stream(pa.BufferReader(content), compression="zstd").read()
    return content


def encoding_of(content: bytes) -> str:
    if content[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    return "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def plain_text(value: Any) -> Any:
    """Missing values as "", and true and false as in JSON."""
    return {None: "", True: "true", False: "false"}[value] if value in (None, True, False) else value


def json_objects(text: str) -> list[dict[str, Any]]:
    """The rows of a JSON text. Numbers are read as their text, NaN as None."""
    numbers = {"parse_int": str, "parse_float": str}
    numbers["parse_constant"] = lambda name: None if name == "NaN" else float(name)
    try:
        value = json.loads(text, **numbers)
    except ValueError:
        with suppress(ValueError):
            return [json.loads(line, **numbers) for line in text.split("\n") if line.strip()]
        rows = []
        decoder = json.JSONDecoder(**numbers)
        while text := text.lstrip(" \t\r\n"):
            row, end = decoder.raw_decode(text)
            rows.append(row)
            text = text[end:]
        return rows
    if isinstance(value, list):
        return value
    columns = {
        k: v for k, v in value.items() if k in {"instruction", "input", "context", "output", "response"}
    }
    if not columns:
        [rows] = [v for v in value.values() if isinstance(v, list)]
        return rows
    if all(isinstance(v, dict) for v in columns.values()):
        assert len({tuple(v) for v in columns.values()}) == 1
        columns = {k: list(v.values()) for k, v in columns.items()}
    elif not all(isinstance(v, list) for v in columns.values()):
        return [columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_file(
    file: File,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    oracle: Oracle,
    longest: int,
    keep: bool,
    limit: float,
) -> None:
    path = folder / file.name
    path.write_bytes(file.content)
    try:
        prepared, ledger = prepare_dataset(str(path), tokenizer, longest, keep, limit, folder / "cache")
    except DataError as error:
        message = str(error)
        assert len(message) < 5000, "too long to read"
        if file.location is not None:
            assert message.startswith(f"{path}{file.location}"), message
        elif "would be dropped" in message:
            rows = file.rows if file.rows is not None else parse_independently(path)
            assert rows is not None
            expected = [oracle.expected(row) if row[0].strip() and row[2].strip() else None for row in rows]
            dropped = sum(
                not row or (row[1] >= longest if keep else len(row[0]) > longest) for row in expected
            )
            assert dropped == len(rows) or dropped > limit * len(rows)
            assert f"{dropped} of {len(rows)} rows" in message
        else:
            assert file.rows is None, message
            assert message.startswith(str(path)), message
        return
    assert file.location is None, "a faulty file was accepted"
    rows = file.rows if file.rows is not None else parse_independently(path)
    assert rows is not None, "an unreadable file was accepted"
    oracle.check(rows, prepared, ledger, longest, keep)


lengths = st.sampled_from([24, 48, 80, 120, 256, 2048])
limits = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@cases(quick=150, sweep=1200)
def test_a_good_file_gives_the_expected_rows_and_masks(
    count: int, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    @fuzz(count, file=good_files(), longest=lengths, keep=st.booleans(), limit=limits)
    def check(file: File, longest: int, keep: bool, limit: float) -> None:
        check_file(file, next(folders), tokenizer, oracle, longest, keep, limit)


@cases(quick=100, sweep=600)
def test_a_fault_in_one_row_is_reported_with_its_row_or_line(
    count: int, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    @fuzz(count, file=faulty_files())
    def check(file: File) -> None:
        check_file(file, next(folders), tokenizer, oracle, 2048, False, 1.0)


@cases(quick=600, sweep=1200)
def test_a_damaged_file_is_refused_by_name_or_parsed_like_an_independent_parser(
    count: int, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    @fuzz(count, file=damaged_files(), keep=st.booleans())
    def check(file: File, keep: bool) -> None:
        check_file(file, next(folders), tokenizer, oracle, 2048, keep, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_rows_of_a_megabyte_are_kept_or_dropped_like_short_ones(
    kind: str, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    long, longer, longest = "x" * 1_000_000, "word " * 200_000, "### End\0" * 125_000
    rows = [("a", "", long), (longer, "", "b"), ("a", longest, "b"), ("a", "", "b")]
    columns = ["instruction", "input", "output"]
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    content = {
        "json": lambda: json.dumps(objects).encode(),
        "jsonl": lambda: "\n".join(map(json.dumps, objects)).encode(),
        "csv": lambda: csv_bytes([columns, *map(list, rows)]),
        "parquet": lambda: parquet_bytes(pa.Table.from_pylist(objects)),
    }[kind]()
    for longest in (2048, 10_000_000):
        file = File(f"rows.{kind}", content, rows=rows)
        check_file(file, next(folders), tokenizer, oracle, longest, False, 0.8)


sources = st.one_of(
    st.text(max_size=10),
    st.lists(
        st.sampled_from(["~", "~nobody", "/", "..", ".", "a", "b.json", ":", "hf://", "csv", "json", "\0", "\n", " ",
                         "x" * 300, "\udce4", "*", "demo", "C:\\", "%00", "http://127.0.0.1:1/"]),
        max_size=4,
    ).map("".join),
)  # fmt: skip


@cases(quick=30, sweep=200)
@pytest.mark.usefixtures("hub")
def test_a_source_that_is_not_a_file_is_refused_by_name(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\n")  # the source "csv" must not find it

    def is_readable(source: str) -> bool:  # the folder of the test, by one of its names
        with suppress(OSError, ValueError, RuntimeError):
            return source.strip() != "" and Path(source).expanduser().resolve() == tmp_path
        return False

    @fuzz(count, source=sources.filter(lambda source: source != "demo" and not is_readable(source)))
    @example(source="csv")
    def check(source: str) -> None:
        with pytest.raises(DataError) as error:
            read_columns(source)
        names = {source, str(Path(source))}
        with suppress(RuntimeError, ValueError):  # an unknown ~user, a null byte
            names.add(str(Path(source).expanduser()))
        assert any(printable(name) in str(error.value) for name in names)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails at once for names on the Hub: without a network, each name would cost retries."""
    real = datasets.load_dataset

    def offline(name: str, split: str) -> Any:  # no selection
        if name in ("csv", "json", "parquet", "text"):
            return real(name, split=split)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
