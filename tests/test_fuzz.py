"""Whatever file, model folder or option a person brings: a correct run, or an error that says what is wrong.

A correct run is checked against this file's own reading of the data, its own words of the prompt, and a
byte-pair encoder that has never heard of control tokens; nothing of `training` is asked what is right.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import EOS
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training import trainer
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.data.ledger import Ledger
from training.data.rows import Columns, read_columns
from training.data.tokens import encode_rows, prepare_dataset
from training.errors import DataError, ModelError, OptionsError
from training.model.loading import load_config, load_model, max_positions
from training.model.tokenizer import load_tokenizer
from training.options.checks import find_problems
from training.options.trainer_options import TrainingOptions
from training.run import prepare

pytestmark = pytest.mark.timeout(600)  # a hang is a fault as well

Row = tuple[str, str, str]  # instruction, input, output
CONTROL = ("### End", "### Instruction:", "### Response:\n")


def cases(quick: int, slow: int) -> pytest.MarkDecorator:
    """How many cases are generated: a few in every run, all of them in the slow tests."""
    return pytest.mark.parametrize("count", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def fuzz(count: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Calls the function below it with `count` generated cases, the same ones in every run."""

    def run(check: Callable[..., None]) -> None:
        settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(check))()

    return run


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """A new folder for every case, removed by the next."""
    numbers = itertools.count()

    def fresh() -> Iterator[Path]:
        while True:
            folder = tmp_path / f"{next(numbers)}"
            folder.mkdir()
            yield folder
            shutil.rmtree(folder)

    return fresh()


# --- the oracle --------------------------------------------------------------------------------------


def prompt_pieces(instruction: str, input: str) -> tuple[str, str, str, str]:
    """Text, control text, text, control text: together the prompt."""
    if input:
        head = (
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n"
        )
        return head, "### Instruction:", f"\n{instruction}\n\n### Input:\n{input}\n\n", "### Response:\n"
    head = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
    )
    return head, "### Instruction:", f"\n{instruction}\n\n", "### Response:\n"


@dataclass
class Oracle:
    """What must become of rows, by a plain byte-pair encoder and the ids of the three control tokens."""

    bpe: ByteLevelBPETokenizer
    control: dict[str, int]
    eos: int
    known: dict[Row, tuple[list[int], int]] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids if text else []

    def expected(self, row: Row) -> tuple[list[int], int]:
        """(ids, where the response begins) of a row, however long."""
        if row not in self.known:
            head, key, body, response = prompt_pieces(row[0], row[1])
            prompt = [*self.encode(head), self.control[key], *self.encode(body), self.control[response]]
            ids = [*prompt, *self.encode(f"{row[2]}\n\n"), self.control["### End"]]
            self.known[row] = ids, len(prompt)
        return self.known[row]

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
            assert (feature["response_start"], feature["length"]) == (start, len(ids))
            self.check_row(
                rows[number - 1], ids, start, whole=len(self.expected(rows[number - 1])[0]) <= longest
            )
        self.check_labels(features)

    def check_row(self, row: Row, ids: list[int], start: int, whole: bool) -> None:
        assert self.text(ids[:start]) == "".join(prompt_pieces(row[0], row[1]))
        assert ids[start - 1] == self.control["### Response:\n"]
        assert [i for i in ids[:start] if i in {*self.control.values(), self.eos}] == [
            self.control["### Instruction:"],
            self.control["### Response:\n"],
        ]
        if whole:
            assert self.text(ids[start:]) == f"{row[2]}\n\n### End"
            assert [i for i in ids[start:] if i in {*self.control.values(), self.eos}] == ids[-1:]
            assert ids[-1] == self.control["### End"]

    def check_labels(self, features: list[dict[str, Any]]) -> None:
        wanted = [
            [-100] * row["response_start"] + row["input_ids"][row["response_start"] :] for row in features
        ]
        packed = DataCollatorForPackedRows(self.eos)(features)
        assert packed["labels"][0].tolist() == [i for row in wanted for i in row]
        assert packed["shift_labels"][0].tolist() == [i for row in wanted for i in row if i != -100]
        padded = DataCollatorForCompletionOnlyLM(self.eos)(features)["labels"].tolist()
        for labels, row in zip(padded, wanted, strict=True):
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
    """A generated file: its name, bytes, and what is known of it.

    `rows` are those it must give; `place` is what an error must name behind the path. With neither it may be
    anything: then it is read again here, and either reading may refuse it, but not give other rows.
    """

    name: str
    content: bytes
    rows: list[Row] | None = None
    place: str | None = None


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
    [
        "rows",
        "my rows",
        "zeilen-ä",
        "行",
        "a:b",
        "x#y?z",
        "100%s",
        "[1]",
        "*",
        "a'b",
        "-rows",
        "rows.json",
        "{x}",
    ]
)
names = st.sampled_from([("instruction", "input", "output"), ("instruction", "context", "response")])
kinds = st.sampled_from(["json", "jsonl", "csv", "parquet"])


def as_objects(draw: Any, rows: list[Row], columns: tuple[str, str, str], nulls: bool = True) -> list[dict]:
    """Rows as JSON or Parquet has them: with columns that are not read, an empty input null or left out."""
    objects = []
    for row in rows:
        each = dict(zip(columns, row, strict=True)) | {"text": 7, "n": [None]}
        if nulls and not row[1]:
            each |= draw(st.sampled_from([{}, {columns[1]: None}]))
        objects.append(each)
    return objects


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
        content = (
            bom + json.dumps(objects, ensure_ascii=ascii_only, indent=draw(st.none() | st.just(1))).encode()
        )
    elif kind == "jsonl":
        between = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]))
        lines = [json.dumps(each, ensure_ascii=ascii_only) for each in as_objects(draw, rows, columns)]
        content = bom + (between.join(lines) + draw(st.sampled_from(["", between]))).encode()
    elif kind == "csv":
        order = draw(st.permutations(range(4)))
        lines = [[[*columns, "text"][i] for i in order], *([[*row, "t"][i] for i in order] for row in rows)]
        content = bom + csv_bytes(lines, end=draw(st.sampled_from(["\n", "\r\n"])))
    else:
        fields = as_objects(draw, rows, columns)
        strings = draw(
            st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
        )
        values = {name: pa.array([each[name] for each in fields], strings) for name in columns}
        content = parquet_bytes(
            pa.table(values), compression=draw(st.sampled_from(["snappy", "zstd", "none"]))
        )
    return File(f"{draw(stems)}.{suffix}", content, rows=rows)


@st.composite
def spoilt_files(draw: Any) -> File:
    """A good table with one fault in one row: the error must name that row, or its line."""
    rows = draw(st.lists(st.tuples(st.just("a"), st.just(""), st.just("b")), min_size=2, max_size=6))
    columns = draw(names)
    at = draw(st.integers(0, len(rows) - 1))
    column = draw(st.sampled_from([columns[0], columns[2]]))
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    stem = draw(stems)
    value = draw(
        st.sampled_from([4, 1.5, True, float("nan"), float("inf"), None, [], ["a"], {}, {"a": {"b": [1]}}])
    )
    fault = draw(st.sampled_from(["value", "input", "surrogate", "left out", "twice", "no object", "broken", "parquet",
                                  "ragged", "quote", "nested", "number", "latin", "bad text"]))  # fmt: skip
    if fault == "parquet":
        kind, array = draw(
            st.sampled_from([("int64", 1), ("binary", b"b"), ("null", None), ("date32", 2**31 - 1)])
        )
        values = {name: [each[name] for each in objects] for name in columns if name != column}
        array = pa.array([array] * len(rows), pa.type_for_alias(kind))
        return File(f"{stem}.parquet", parquet_bytes(pa.table(values | {column: array})), place=", row 1: ")
    if fault == "bad text":  # the row's text is not UTF-8
        blob = b"b" * at + b"\xff" + b"b" * (len(rows) - 1 - at)
        offsets = np.arange(len(rows) + 1, dtype=np.int32).tobytes()
        bad = pa.Array.from_buffers(pa.string(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(blob)])
        values = {name: pa.array([each[name] for each in objects]) for name in columns}
        return File(
            f"{stem}.parquet", parquet_bytes(pa.table(values | {column: bad})), place=f", row {at + 1}: "
        )
    if fault in ("ragged", "quote", "latin"):
        lines = [list(columns), *map(list, rows)]
        if fault == "ragged":
            lines[at + 1] = lines[at + 1] + ["x"] if draw(st.booleans()) else lines[at + 1][:-1]
            return File(f"{stem}.csv", csv_bytes(lines), place=f", line {at + 2}: ")
        content = csv_bytes(lines).split(b"\n")
        content[at + 1] += b'"x' if fault == "quote" else b"\xe9"
        return File(f"{stem}.csv", b"\n".join(content), place=f", line {at + 2}: ")
    listed = fault in ("value", "input", "surrogate", "left out", "no object") and draw(st.booleans())
    if fault == "value":
        objects[at][column] = value
    elif fault == "input":
        objects[at][columns[1]] = value if value is not None else 7
    elif fault == "surrogate":
        objects[at][column] = "\ud83d"
    elif fault == "left out":
        del objects[at][column]
    elif fault == "no object":
        objects[at] = draw(st.sampled_from([[], ["a"], 7, "a", None, True]))
    lines = [json.dumps(each) for each in objects]
    broken = {
        "twice": lines[at][:-1] + f', "{column}": "c"}}',
        "broken": lines[at][: draw(st.integers(1, 20))],
        "nested": '{"a":' * 100_000,
        "number": f'{{"{column}": {"1" * 5000}}}',
    }
    # A list in the first line makes it a JSON list, with the other lines behind it.
    if listed or (fault == "no object" and isinstance(objects[0], list)):
        return File(f"{stem}.json", json.dumps(objects).encode(), place=f", row {at + 1}: ")
    if fault in broken:
        lines[at] = broken[fault]
        return File(f"{stem}.jsonl", "\n".join(lines).encode(), place=f", line {at + 1}: ")
    return File(f"{stem}.jsonl", "\n".join(lines).encode(), place=f", row {at + 1}: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["instruction", "input", "context", "output", "response", "text"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@st.composite
def damaged_files(draw: Any) -> File:
    """A good file cut, changed, doubled or saved in another encoding; or JSON, or bytes, of any kind."""
    source = draw(good_files())
    content = bytearray(source.content)
    place = draw(st.integers(0, max(0, len(content) - 1)))
    change = draw(
        st.sampled_from(
            [
                "cut",
                "byte",
                "insert",
                "swap",
                "encoding",
                "double",
                "json",
                "lines",
                "bytes",
                "gzip",
                "suffix",
            ]
        )
    )
    name = source.name
    if change == "cut":
        del content[place:]
    elif change == "byte":
        content[place : place + 1] = bytes([draw(st.integers(0, 255))])
    elif change == "insert":
        content[place:place] = draw(
            st.sampled_from([b"\0", b"\xff", b'"', b",", b"\n", b"\r", b"\xed\xa0\x80", b"{", b"]"])
        )
    elif change == "swap":
        end = draw(st.integers(place, len(content)))
        content[place:end] = content[place:end][::-1]
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
    elif change == "gzip":
        content[:0] = b"\x1f\x8b\x08\0"
    elif change == "suffix":
        name = name.rsplit(".", 1)[0] + draw(
            st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ""])
        )
    return File(name, bytes(content))


def read_again(path: Path) -> list[Row] | None:
    """The rows of a file by other means than `training.rows`; None where it has none that could be used."""
    with suppress(Exception):
        if path.suffix.lower() == ".parquet":
            objects = pq.read_table(path).to_pylist()
        elif path.suffix.lower() == ".csv":
            csv.field_size_limit(2**31 - 1)
            text = path.read_bytes().decode("utf-8-sig")
            objects = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            text = path.read_bytes().decode("utf-8-sig")
            listed = text.lstrip().startswith("[")
            objects = json.loads(text) if listed else [json.loads(x) for x in text.split("\n") if x.strip()]
        rows = []
        for each in objects:
            [output] = [each[name] for name in ("output", "response") if name in each]
            inputs = [each[name] for name in ("input", "context") if name in each]
            rows.append((each["instruction"], (inputs[0] if inputs else "") or "", output))
        if all(isinstance(text, str) for row in rows for text in row):
            return rows
    return None


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
        if file.place is not None:
            assert message.startswith(f"{path}{file.place}"), message
        elif "would be dropped" in message:
            rows = file.rows if file.rows is not None else read_again(path)
            assert rows is not None
            dropped = [row for row in rows if not row[2].strip()]
            if not keep:
                dropped = [
                    row for row in rows if not row[2].strip() or len(oracle.expected(row)[0]) > longest
                ]
            elif longest < 1000:
                dropped = [row for row in rows if not row[2].strip() or oracle.expected(row)[1] >= longest]
            assert len(dropped) == len(rows) or len(dropped) > limit * len(rows)
            assert f"{len(dropped)} of {len(rows)} rows" in message
        else:
            assert file.rows is None, message
            assert message.startswith(str(path)), message
        return
    assert file.place is None, "a file with a fault was taken"
    rows = file.rows if file.rows is not None else read_again(path)
    assert rows is not None, "a file was taken that cannot be read"
    oracle.check(rows, prepared, ledger, longest, keep)


lengths = st.sampled_from([24, 48, 80, 120, 256, 2048])
limits = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@cases(quick=150, slow=1200)
def test_a_good_file_gives_the_rows_and_masks_that_it_must(
    count: int, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    @fuzz(count, file=good_files(), longest=lengths, keep=st.booleans(), limit=limits)
    def check(file: File, longest: int, keep: bool, limit: float) -> None:
        check_file(file, next(folders), tokenizer, oracle, longest, keep, limit)


@cases(quick=100, slow=600)
def test_a_fault_in_one_row_is_told_with_its_row_or_line(
    count: int, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    @fuzz(count, file=spoilt_files())
    def check(file: File) -> None:
        check_file(file, next(folders), tokenizer, oracle, 2048, False, 1.0)


@cases(quick=150, slow=1200)
def test_a_damaged_file_is_refused_by_name_or_read_as_others_read_it(
    count: int, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    @fuzz(count, file=damaged_files(), keep=st.booleans())
    def check(file: File, keep: bool) -> None:
        check_file(file, next(folders), tokenizer, oracle, 2048, keep, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_rows_of_a_megabyte_are_kept_or_dropped_like_others(
    kind: str, folders: Iterator[Path], tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    rows = [
        ("a", "", "x" * 1_000_000),
        ("word " * 200_000, "", "b"),
        ("a", "### End\0" * 125_000, "b"),
        ("a", "", "b"),
    ]
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


@cases(quick=30, slow=200)
@pytest.mark.usefixtures("hub")
def test_a_name_that_is_no_file_is_refused_by_that_name(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\n")  # which "csv" must not find

    @fuzz(count, source=sources.filter(lambda source: source != "demo"))
    @example(source="csv")
    def check(source: str) -> None:
        with pytest.raises(DataError) as error:
            read_columns(source)
        names = {source, str(Path(source))}
        with suppress(RuntimeError, ValueError):  # no such home, a null byte
            names.add(str(Path(source).expanduser()))
        assert any(name in str(error.value) for name in names)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network that is off anyway, each name costs retries."""
    real = datasets.load_dataset

    def offline(name: str, split: str) -> Any:
        if name in ("csv", "json", "parquet", "text"):
            return real(name, split=split)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)


# --- model folders -----------------------------------------------------------------------------------


class Bomb:
    """What a pickle runs when it is loaded the unsafe way: it leaves a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def json_file_changed(path: Path, draw: Any) -> None:
    """Gives one entry, somewhere in the file, another value, or none, or another name."""
    whole = json.loads(path.read_text())
    section = whole
    for _ in range(draw(st.integers(0, 3))):
        inner = list(section.values()) if isinstance(section, dict) else section
        deeper = [each for each in inner if isinstance(each, dict | list) and each]
        if not deeper:
            break
        section = draw(st.sampled_from(deeper))
    key = draw(st.sampled_from(list(section) if isinstance(section, dict) else list(range(len(section)))))
    change = draw(st.sampled_from(["value", "value", "remove", "rename"]))
    if change == "value":
        section[key] = draw(wrong_values)
    elif change == "remove":
        del section[key]
    elif isinstance(section, dict):
        section[f"{key}s"] = section.pop(key)
    path.write_text(json.dumps(whole))


wrong_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 5, 64, 361, 362, 365, 500, 1.5, float("nan"), float("inf"), 10**30]),
    st.sampled_from(["", "auto", "x", "3", "### End", "</s>", "bert", "gpt2", "t5", "GPT2LMHeadModel", "LlamaForCausalLM"]),
    st.sampled_from([[], {}, [1], ["BertForMaskedLM"], [None], {"a": 1}, {"type": "x"}, {"content": "### End"}]),
)  # fmt: skip
garbage = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"{}", b"[]", b"null", b"{", b'"x"', b"7", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"a": NaN}',
                     b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"{}", b"\x80\x04."]),
)  # fmt: skip


def spoil_tensors(folder: Path, draw: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    change = draw(
        st.sampled_from(
            ["drop", "rename", "shape", "longer", "integers", "scalar", "half", "double", "extra", "none"]
        )
    )
    if change in ("drop", "rename"):
        del tensors[name]
    if change == "none":
        tensors = {}
    changed = {
        "rename": {f"{name}.old": tensor},
        "shape": {name: tensor.flatten()[: tensor.numel() // 2].clone()},
        "longer": {name: torch.cat([tensor, tensor])},
        "integers": {name: tensor.to(torch.int64)},
        "scalar": {name: torch.zeros(())},
        "half": {name: tensor.half()},
        "double": {name: tensor.double()},
        "extra": {"more.weight": torch.zeros(3)},
    }
    save_file(tensors | changed.get(change, {}), path, metadata={"format": "pt"})


def spoil_model(folder: Path, draw: Any) -> None:
    """One fault in the folder of a model, and now and then a second."""
    trace = folder / "was_here"
    weights = folder / "model.safetensors"
    for _ in range(draw(st.integers(1, 2))):
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        change = draw(st.sampled_from(["json", "json", "json", "tensors", "tensors", "cut", "garbage", "remove", "folder", "index", "pickle"]))  # fmt: skip
        name = draw(
            st.sampled_from([name for name in files if change != "json" or name.endswith("json")] or files)
        )
        if change == "json":
            with suppress(ValueError, IndexError):  # an earlier change made it no JSON, or empty
                json_file_changed(folder / name, draw)
        elif change == "tensors" and weights.is_file():
            with suppress(Exception):  # an earlier change made it no such file
                spoil_tensors(folder, draw)
        elif change == "cut":
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: draw(st.integers(0, len(content)))])
        elif change == "garbage":
            (folder / name).write_bytes(draw(garbage))
        elif change in ("remove", "folder"):
            (folder / name).unlink()
            if change == "folder":
                (folder / name).mkdir()
        elif change == "index" and weights.is_file():
            parts = draw(
                st.sampled_from([{}, {"lm_head.weight": "none.safetensors"}, {"lm_head.weight": 7}, [], None])
            )
            index = {"metadata": draw(st.sampled_from([{}, None, []])), "weight_map": parts}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            weights.rename(folder / "elsewhere.safetensors")
        elif change == "pickle":
            if weights.is_dir():
                weights.rmdir()
            weights.unlink(missing_ok=True)
            state = draw(st.sampled_from([Bomb(trace), {"lm_head.weight": Bomb(trace)}, {"a": 1}, [1], None]))
            if draw(st.booleans()):
                torch.save(state, folder / "pytorch_model.bin")
            else:
                (folder / "pytorch_model.bin").write_bytes(pickle.dumps(state))


def use_model(name: str) -> None:
    """What training does with a folder before its first step; what comes of it must be whole."""
    assert max_positions(load_config(name)) > 0
    tokenizer = load_tokenizer(name)
    model = load_model(name, tokenizer, torch.float32, seed=42)
    control = [tokenizer.convert_tokens_to_ids(word) for word in CONTROL]
    words = f"a ### End {EOS}\n\n### Response:\nb ### Instruction: "
    [(_, ids, start)] = encode_rows(tokenizer, Columns([words], [words], [words]), Ledger("", 10_000))
    assert [i for i in ids[:start] if i in control] == control[1:]
    assert [i for i in ids[start:] if i in control] == [ids[-1]] == control[:1]
    assert tokenizer.eos_token_id not in ids or tokenizer.eos_token_id in control
    assert max(tokenizer.get_vocab().values()) < len(model.get_input_embeddings().weight)
    files = [file for file in Path(name).glob("*.safetensors") if file.is_file()]
    saved = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for key, tensor in model.state_dict().items():
        if saved:
            rows = len(saved[key]) if saved[key].ndim else None
            assert torch.equal(tensor[:rows] if rows else tensor, saved[key].float()), key


@cases(quick=40, slow=500)
def test_a_spoilt_model_folder_is_refused_by_name_or_whole(
    count: int, folders: Iterator[Path], base_folder: Path
) -> None:
    @fuzz(count, data=st.data())
    def check(data: st.DataObject) -> None:
        folder = next(folders) / "model"
        shutil.copytree(base_folder, folder)
        spoil_model(folder, data.draw)
        try:
            use_model(str(folder))
        except ModelError as error:
            message = str(error)
        else:
            message = f"{folder}: whole"
        assert message.startswith(f"{folder}: ")
        assert len(message) < 2000
        assert "above report" not in message
        assert not (folder / "was_here").exists(), "a pickle was run"


# --- options -----------------------------------------------------------------------------------------

WHOLE_NUMBERS_BAD = ("x", "", "1.5", "nan", "inf", "1e3", "0x10", "--", "½", "1 2", "-1")
RATES_BAD = ("x", "", "nan", "inf", "-inf", "1e999", "-1", "-1e-9", "1,5", "½", "0x1p3")
HUGE = "9" * 30
# option -> (values that may stand, values that may not)
VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--input-model": (("demo", "gpt2", "Ä B", "a:b"), ("", " ", "a\udce4")),
    "--training-dataset": (("demo", "tatsu-lab/alpaca", "Ä B.json", "x" * 300), ("", "\n", "a\udce4")),
    "--max-length": (("8", "2048", HUGE), (*WHOLE_NUMBERS_BAD, "7", "0")),
    "--max-dropped-fraction": (("0", "1", "0.5", "1e-300"), (*RATES_BAD, "1.0001")),
    "--test-size": (("1", "٣", " 4 ", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--seed": (("0", "4294967295"), (*WHOLE_NUMBERS_BAD, "4294967296", HUGE)),
    "--epochs": (("3", "0.001", "10000"), (*RATES_BAD, "0", "1e-400", "1e300")),
    "--max-steps": (("1", "1000000000"), (*WHOLE_NUMBERS_BAD, "0", HUGE)),
    "--lr": (("1e-5", "5e-324", "1"), (*RATES_BAD, "0", "-0")),
    "--lr-scheduler-type": (
        ("constant", "constant_with_warmup", "linear", "cosine"),
        ("", "CONSTANT", "wavy", "linear "),
    ),
    "--warmup-steps": (("0", "5", HUGE), WHOLE_NUMBERS_BAD),
    "--weight-decay": (("0", "0.1"), RATES_BAD),
    "--per-device-train-batch-size": (("1", "8", "1024"), (*WHOLE_NUMBERS_BAD, "0", "1025", HUGE)),
    "--per-device-eval-batch-size": (("1", "8", "1024"), (*WHOLE_NUMBERS_BAD, "0", "1025", HUGE)),
    "--batching": (("packed", "padded"), ("", "Packed", "both")),
    "--max-tokens-per-device": (("1", "4096", HUGE, "auto"), (*WHOLE_NUMBERS_BAD, "0", "Auto")),
    "--gradient-checkpointing": (("auto", "on", "off"), ("", "yes", "ON")),
    "--rank-timeout": (("10", "1800", HUGE), (*WHOLE_NUMBERS_BAD, "9")),
    "--final-model": (("last", "best"), ("", "first")),
    "--resume": (("never", "auto", "empty"), ("", "none", "a_file", "a\udce4", "~nobody-here/x", "x" * 300)),
    "--gradient-accumulation-steps": (("1", "4", "1024"), (*WHOLE_NUMBERS_BAD, "0", "1025", HUGE)),
    "--logging-steps": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--eval-steps": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--save-steps": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--save-total-limit": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--max-shard-size": (("5GB", "500MB", "1KB"), ("", "5", "0GB", "-1GB", "5 GB", "5gb", "GB", "5.5GB", "9" * 5000 + "GB", "٣GB")),
    "--local_rank": (("-1", "0", "7"), ("x", "", "1.5")),
    "--local-output-dir": (
        ("new", "new folder", "neü/🚀", "a:b", "-x", "{x}", "empty", "new/../other"),
        ("", " ", "full", "a_file", "a_file/x", "/dbfs/x", "/Volumes/x", "dbfs:/x", "~nobody-here/x", "a\0b", "a\udce4",
         "loop/x", "x" * 300),
    ),
    "--dbfs-output-dir": (
        ("pub", "neü/🚀 2", "empty/pub", "full/pub"),
        ("", "full", "a_file", "a_file/x", "dbfs:/x", "~nobody-here/y", "a\0b", "a\udce4", "loop/y", "x" * 300),
    ),
    "--deepspeed": ((), ("", "none.json", "full", "a_file", "a\0b", "x" * 300, "~nobody-here/ds.json", "broken.json")),
}  # fmt: skip
SWITCHES = (
    "--keep-truncated", "--trust-remote-code", "--bf16", "--no-bf16", "--fp16", "--no-fp16", "--force",
)  # fmt: skip
STRANGE = (
    "--bf61",
    "--",
    "extra",
    "-",
    "--lr=",
    "-x",
    "--lr==1",
    "--bf16=1",
    "--keep-truncated=no",
    "--Lr",
    "\udce4",
)


@st.composite
def command_lines(draw: Any) -> tuple[dict[str, str], list[str]]:
    chosen = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=6, unique=True))
    if draw(st.integers(0, 9)):
        chosen = [*chosen, "--local-output-dir"]
    given_values = {}
    for flag in dict.fromkeys(chosen):
        good, bad = VALUES[flag]
        given_values[flag] = draw(st.sampled_from(good if good and draw(st.integers(0, 3)) else bad))
    return given_values, draw(st.lists(st.sampled_from(SWITCHES), max_size=2, unique=True))


def contradictions(values: dict[str, str], switches: list[str]) -> list[str]:
    """What a message must hold where good values do not go together, on one process without a GPU."""

    def value(flag: str, default: str) -> str:
        return values[flag] if flag in values and values[flag] in VALUES[flag][0] else default

    on = dict.fromkeys(("bf16", "fp16"))
    for switch in switches:  # the last one counts
        name = switch.removeprefix("--").removeprefix("no-")
        if name in on:
            on[name] = not switch.startswith("--no-")
    needed = []
    if value("--lr-scheduler-type", "constant") == "constant" and value("--warmup-steps", "0") != "0":
        needed.append("--warmup-steps")
    if value("--batching", "packed") == "padded" and value("--max-tokens-per-device", "auto") != "auto":
        needed.append("--max-tokens-per-device")
    if on["fp16"]:
        needed.append("--bf16 and --fp16 exclude each other" if on["bf16"] else "fp16 needs a CUDA GPU")
    return needed


@pytest.fixture
def nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrainingOptions]:
    """A folder with some things in it; training ends after its own checks. Collects what it would train with."""
    accepted: list[TrainingOptions] = []

    def checked(options: TrainingOptions, request: object) -> dict[str, str]:
        if problems := find_problems(options):
            raise OptionsError(*problems)
        accepted.append(options)
        return {"status": "finished"}

    monkeypatch.setattr(trainer, "train", checked)
    monkeypatch.chdir(tmp_path)
    for folder in ("full", "empty"):
        (tmp_path / folder).mkdir()
    for file in ("full/model.safetensors", "a_file"):
        (tmp_path / file).touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken.json").write_text("{")
    return accepted


@cases(quick=250, slow=1500)
def test_options_are_taken_or_told_with_their_values_and_nothing_is_written(
    count: int, tmp_path: Path, nothing_is_trained: list[TrainingOptions]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    @fuzz(count, line=command_lines())
    @example(line=({}, []))
    def check(line: tuple[dict[str, str], list[str]]) -> None:
        values, switches = line
        nothing_is_trained.clear()
        arguments = [part for flag, value in values.items() for part in (f"{flag}={value}",)]
        result = CliRunner().invoke(trainer.main, arguments + switches)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        wrong = [flag for flag, value in values.items() if value in VALUES[flag][1]]
        needed = wrong + contradictions(values, switches)
        if "--local-output-dir" not in values:
            needed.append("Missing option '--local-output-dir'")
        assert result.exit_code == (2 if needed else 0), result.output
        assert len(nothing_is_trained) == (0 if needed else 1)
        for words in needed:
            assert words in result.output, result.output
        for flag in wrong:
            shown = {values[flag]}
            with suppress(ValueError):
                shown.add(str(float(values[flag])))  # 1e999 is told as inf
            if values[flag].isprintable() and values[flag].strip() and len(values[flag]) < 100:
                assert any(value in result.output for value in shown), result.output
        assert "Traceback" not in result.output
        assert sorted(tmp_path.rglob("*")) == before


@cases(quick=50, slow=200)
def test_a_command_line_that_is_none_is_told(
    count: int, tmp_path: Path, nothing_is_trained: list[TrainingOptions]
) -> None:
    words = st.sampled_from([*STRANGE, *VALUES, *SWITCHES, "1", "new"]) | st.text(max_size=8)

    @fuzz(count, line=st.lists(words, max_size=6))
    def check(line: list[str]) -> None:
        if "--help" in line:
            return
        nothing_is_trained.clear()
        result = CliRunner().invoke(trainer.main, line)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == (0 if nothing_is_trained else 2)
        assert result.output.strip() or nothing_is_trained
        assert "Traceback" not in result.output


# --- DeepSpeed files ---------------------------------------------------------------------------------

SETTINGS = (
    "bf16", "fp16", "optimizer", "scheduler", "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "checkpoint",
    "activation_checkpointing", "data_types", "comms_logger", "flops_profiler", "communication_data_type",
)  # fmt: skip
INNER = (
    "enabled", "stage", "params", "type", "lr", "betas", "eps", "weight_decay", "offload_optimizer", "offload_param", "device",
    "overlap_comm", "reduce_bucket_size", "stage3_gather_16bit_weights_on_model_save", "loss_scale", "load_universal",
)  # fmt: skip
scraps = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, 4, 8, 64, -1, 1.0, 1e-5, 1e9, 1e-3, "auto", "8", "3", "true", "", "AdamW", "Adam", "x",
     "cpu", "none", float("nan"), float("inf"), [], [1], {}, [0.9, 0.999], {"device": "cpu"}, {"lr": "auto"}, 10**30]
)  # fmt: skip


@st.composite
def deepspeed_files(draw: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    if draw(st.booleans()):
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto"},
        }
    for _ in range(draw(st.integers(0, 3))):
        sections = [config, *(each for each in config.values() if isinstance(each, dict))]
        sections += [each["params"] for each in sections if isinstance(each.get("params"), dict)]
        section = draw(st.sampled_from(sections))
        key = draw(st.sampled_from(SETTINGS if section is config else INNER))
        if draw(st.integers(0, 3)):
            section[key] = copy.deepcopy(draw(scraps))
        else:
            section.pop(key, None)
    return json.loads(json.dumps(config))


@cases(quick=120, slow=800)
def test_a_deepspeed_file_is_told_or_read_by_the_libraries_as_the_options_say(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    # The configuration alone is the subject: no process group, no GPU.
    monkeypatch.setattr("transformers.training_args.TrainingArguments._setup_devices", torch.device("cpu"))
    monkeypatch.setattr("transformers.training_args.TrainingArguments.world_size", 1)
    path = tmp_path / "ds.json"
    environment = dict(os.environ)

    @fuzz(count, config=deepspeed_files(), accumulation=st.sampled_from([1, 4]))
    def check(config: dict[str, Any], accumulation: int) -> None:
        path.write_text(json.dumps(config))
        options = TrainingOptions(
            local_output_dir=str(tmp_path / "out"),
            deepspeed=str(path),
            gradient_accumulation_steps=accumulation,
        )
        problems = find_problems(options)
        assert all(str(path) in fault or "CUDA" in fault for fault in problems), problems
        assert all(len(fault) < 3000 for fault in problems)
        if problems:
            return
        try:
            args = prepare.training_arguments(options)
            tiny = GPTJConfig(vocab_size=8, n_positions=8, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
            args.hf_deepspeed_config.trainer_config_finalize(
                args, GPTJForCausalLM(tiny), num_training_steps=10
            )
            read = DeepSpeedConfig(args.hf_deepspeed_config.config)
        finally:
            unset_hf_deepspeed_config()
            os.environ.clear()
            os.environ.update(environment)
        assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (8, accumulation)
        assert read.train_batch_size == 8 * accumulation
        assert read.scheduler_name is None
        assert read.zero_config.gather_16bit_weights_on_model_save or read.zero_optimization_stage != 3
        if read.optimizer_name is not None:
            assert (read.optimizer_params["lr"], read.optimizer_params.get("weight_decay", 0)) == (1e-5, 0)
        assert not (tmp_path / "out").exists()
