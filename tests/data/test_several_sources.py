"""Several sources in one run: their rows in order, one ledger, held-out rows of each, and labels."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.conftest import jsonl, say_rows
from training.data import tokens
from training.data.held_out import held_out_shares, rows_digest, source_of_each, split_held_out
from training.data.ledger import Ledger
from training.data.source_labels import source_labels
from training.data.sources import places_of, read_sources
from training.data.tokens import prepare_sources
from training.errors import DataError

BLANK = {"instruction": "Say nothing.", "input": "", "output": " "}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two files in the working folder: 70 rows and a blank one, and 30 rows. The cache is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    jsonl(Path("a.jsonl"), [*say_rows(70), BLANK])
    jsonl(Path("b.jsonl"), say_rows(30))
    return ["a.jsonl", "b.jsonl"]


# --- one source --------------------------------------------------------------------------------------


def test_a_single_source_has_the_rows_split_digest_and_ledger_of_earlier_versions(
    files: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The literals are those of the version before a run could have several sources."""
    rows, ledger = prepare_sources(files[:1], tokenizer, 96, max_dropped_fraction=0.2)
    trained, held_out = split_held_out(rows, 7, 42)
    assert trained["row"][:] == [
        57, 10, 56, 24, 19, 2, 17, 34, 64, 37, 59, 16, 51, 47, 3, 53, 9, 65, 23, 40, 5, 31, 61, 48, 33, 41, 52, 66,
        26, 18, 11, 50, 39, 68, 30, 12, 6, 49, 8, 55, 54, 4, 32, 21, 1, 45, 67, 14, 13, 36, 15, 20, 38, 43, 46, 28, 69,
    ]  # fmt: skip
    assert held_out["row"][:] == [44, 42, 60, 29, 58, 22, 25]
    assert "source" not in rows.column_names
    ids = "".join(json.dumps(row) for part in (trained, held_out) for row in part["input_ids"])
    assert hashlib.sha256(ids.encode()).hexdigest() == (
        "c5078ef033d98417cd09afc186cfd92cb385993ad43f832b11b3f14a00829156"
    )
    assert rows_digest(trained, held_out) == (
        "4b56acb650724061ff41b97b5d98c7ce4773bfb47860aa19aa68418329fff2a8"
    )
    ledger.save(Path("ledger.json"))
    saved = json.loads(Path("ledger.json").read_text())
    assert "sources" not in saved
    earlier = {
        "source": "a.jsonl",
        "max_length": 96,
        "rows_read": 71,
        "rows_kept": 64,
        "dropped": {"response would be cut at max_length": 6, "empty response": 1},
        "first_dropped_rows": {
            "response would be cut at max_length": [7, 27, 35, 62, 63, 70],
            "empty response": [71],
        },
        "rows_truncated": 0,
        "tokens": 4386,
        "response_tokens": 1291,
        "longest_row": 96,
        "length_histogram": {"<=64": 23, "<=96": 41},
        "files": {},
        "not_read": [],
    }
    assert {name: saved[name] for name in earlier} == earlier
    Path("ledger.json").write_text(json.dumps(earlier))
    assert str(Ledger.read(Path("ledger.json"))) == str(ledger), "of an older run"


# --- rows --------------------------------------------------------------------------------------------


def test_rows_follow_in_the_order_typed_with_their_source_and_their_number_in_it(
    files: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = [prepare_sources([file], tokenizer, 200)[0] for file in files]
    for order in ([0, 1], [1, 0]):
        rows, _ = prepare_sources([files[number] for number in order], tokenizer, 200)
        first, second = (alone[number] for number in order)
        assert rows["input_ids"][:] == first["input_ids"][:] + second["input_ids"][:]
        assert rows["row"][:] == first["row"][:] + second["row"][:]
        assert rows["source"][:] == [0] * len(first) + [1] * len(second)
        assert rows.features["source"].dtype == "int32"
        assert rows.cache_files, "memory-mapped"


def test_another_source_tokenises_only_its_own_rows(
    files: list[str], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[str] = []
    encode: Callable = tokens.encode_rows

    def spied(tokenizer, columns, ledger, *more):
        tokenised.append(ledger.source)
        return encode(tokenizer, columns, ledger, *more)

    monkeypatch.setattr(tokens, "encode_rows", spied)
    prepare_sources(files[:1], tokenizer, 200)
    prepare_sources(files, tokenizer, 200)
    prepare_sources(files[::-1], tokenizer, 200)
    assert tokenised == files


def test_each_source_keeps_to_the_limit_of_dropped_rows(
    files: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """17 bad rows of 30 are few among 1,000, but the source is bad."""
    jsonl(Path("a.jsonl"), say_rows(1000))
    jsonl(Path("b.jsonl"), [*say_rows(13), *[BLANK] * 17])
    with pytest.raises(
        DataError, match=r"(?s)17 of 30 rows would be dropped.*b\.jsonl: 30 rows read, 13 kept"
    ):
        prepare_sources(files, tokenizer, 200)


def test_sources_with_the_same_rows_are_refused(files: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Another name of a file is noticed by its path, and a copy, also of another kind, by its rows."""
    Path("folder").mkdir()
    Path("folder/a.jsonl").symlink_to(Path("a.jsonl").resolve())
    jsonl(Path("folder/c.jsonl"), say_rows(3))
    Path("copy.json").write_text(json.dumps([*say_rows(70), BLANK]))
    for other, same in (
        ("./a.jsonl", "is the same as"),
        ("folder", "shares a.jsonl with"),
        ("copy.json", "has the same rows as"),
    ):
        with pytest.raises(DataError) as refusal:
            prepare_sources(["b.jsonl", "a.jsonl", other], tokenizer, 200)
        assert str(refusal.value) == (
            f"{other}: {same} a.jsonl, so rows that are held out would also be trained on. Leave one of them out"
        )


def test_a_source_of_which_no_row_is_left_is_refused_whatever_share_may_be_dropped(
    files: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    jsonl(Path("b.jsonl"), [BLANK] * 5)
    with pytest.raises(DataError, match="5 of 5 rows would be dropped, and none is left"):
        prepare_sources(files, tokenizer, 200, max_dropped_fraction=1.0)


def test_a_part_of_a_dataset_on_the_hub_is_chosen_for_no_file(
    files: list[str], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, dict] = {}
    prepare = tokens.prepare_dataset

    def spied(source, *arguments, selection, **more):
        asked[source] = dict(selection)
        return prepare("b.jsonl" if "/" in source else source, *arguments, selection={}, **more)

    monkeypatch.setattr(tokens, "prepare_dataset", spied)
    prepare_sources(["a.jsonl", "owner/rows"], tokenizer, 200, selection={"split": "test"})
    assert asked == {"a.jsonl": {}, "owner/rows": {"split": "test"}}


# --- the ledger --------------------------------------------------------------------------------------


def test_the_ledger_of_several_sources_has_totals_and_the_ledger_of_each(
    files: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = [prepare_sources([file], tokenizer, 96, max_dropped_fraction=0.2)[1] for file in files]
    _, ledger = prepare_sources(files, tokenizer, 96, max_dropped_fraction=0.2)
    assert ledger.sources == alone
    assert ledger.source == "a.jsonl, b.jsonl"
    assert (ledger.rows_read, ledger.rows_kept, ledger.turns) == (101, 92, 92)
    assert (ledger.tokens, ledger.response_tokens, ledger.longest_row) == (6266, 1840, 96)
    assert ledger.dropped == {"response would be cut at max_length": 8, "empty response": 1}
    assert ledger.length_histogram == {"<=64": 34, "<=96": 58}
    assert sum(ledger.length_histogram.values()) == ledger.rows_kept
    ledger.save(Path("ledger.json"))
    assert Ledger.read(Path("ledger.json")) == ledger
    saved = json.loads(Path("ledger.json").read_text())
    assert saved["rows_read"] == sum(source["rows_read"] for source in saved["sources"]) == 101
    assert "sources" not in saved["sources"][0]
    assert str(ledger) == (
        f"{alone[0]}\n{alone[1]}\n"
        "2 sources: 101 rows read, 92 kept, 0 truncated at 96 tokens; 6,266 tokens, 1,840 of them in responses, "
        "longest row 96"
    )


def test_a_row_of_several_sources_is_named_by_its_source_and_in_a_folder_by_its_file() -> None:
    parts = [
        Ledger("a.jsonl", 9, rows_read=5),
        Ledger("folder", 9, rows_read=6, files={"1.csv": 2, "2.csv": 4}),
    ]
    ledger = Ledger("both", 9, sources=parts)
    assert [ledger.place(row) for row in (1, 5, 6, 9)] == [
        "a.jsonl row 1",
        "a.jsonl row 5",
        "folder 1.csv row 1",
        "folder 2.csv row 2",
    ]
    assert ledger.places([(1, 4), (0, 5), (0, 2)]) == "rows 2, 5 of a.jsonl and row 2.csv row 2 of folder"
    assert parts[0].places([(0, 3), (0, 1)]) == "rows 1, 3 of a.jsonl"


# --- held-out rows -----------------------------------------------------------------------------------


def test_each_source_holds_out_the_rows_that_dollys_two_calls_choose(
    files: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, _ = prepare_sources(files, tokenizer, 200)
    trained, held_out = split_held_out(rows, 10, 42)
    assert Counter(source_of_each(held_out)) == {0: 7, 1: 3}
    for number, (file, share) in enumerate(zip(files, (7, 3), strict=True)):
        alone = split_held_out(prepare_sources([file], tokenizer, 200)[0], share, 42)
        of_source = [
            [row for source, row in zip(source_of_each(part), part["row"], strict=True) if source == number]
            for part in (trained, held_out)
        ]
        assert of_source[0] == alone[0]["row"][:]
        assert sorted(of_source[1]) == sorted(alone[1]["row"])
    assert source_of_each(held_out) != sorted(source_of_each(held_out)), "the first rows are a mixture"
    again = split_held_out(rows, 10, 42)
    assert rows_digest(*again) == rows_digest(trained, held_out)
    swapped = split_held_out(prepare_sources(files[::-1], tokenizer, 200)[0], 10, 42)
    assert rows_digest(*swapped) != rows_digest(trained, held_out)
    columns, starts = read_sources(files)
    texts = [
        (say_rows(70), say_rows(30))[s][r - 1]["instruction"]
        for s, r in zip(source_of_each(held_out), held_out["row"], strict=True)
    ]
    assert [columns.instruction[place] for place in places_of(held_out, starts)] == texts


@pytest.mark.parametrize(
    ("counts", "test_size", "shares"),
    [
        ([70], 7, [7]),
        ([70, 30], 10, [7, 3]),
        ([900, 100], 100, [90, 10]),
        ([900, 90, 10, 2], 20, [16, 2, 1, 1]),
        ([52_002, 15_011], 1000, [776, 224]),
        ([5, 5], 3, [2, 1]),
        ([1000, 2, 2], 3, [1, 1, 1]),
        ([1000, 2, 2], 2, [2, 0, 0]),  # too few for one of each
        ([1, 5], 3, [0, 3]),
        ([1, 1], 1, [1, 0]),
    ],
)
def test_held_out_rows_are_in_proportion_with_one_of_each_source(
    counts: list[int], test_size: int, shares: list[int]
) -> None:
    assert held_out_shares(counts, test_size) == shares


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_add_up_leave_rows_to_train_on_and_are_near_proportion(counts: list[int], part: float) -> None:
    test_size = max(1, math.floor(part * (sum(counts) // 2)))
    shares = held_out_shares(counts, test_size)
    assert sum(shares) == test_size
    sources = [source for source, count in enumerate(counts) if count > 1]
    for source, (count, share) in enumerate(zip(counts, shares, strict=True)):
        assert 0 <= share <= max(1, count - 1)
        assert source not in sources or len(sources) > test_size or share >= 1
        assert share <= test_size * count / sum(counts) + 1


def test_a_source_of_one_row_is_trained_on_or_held_out() -> None:
    rows = datasets.Dataset.from_dict({"row": [1, 1, 2, 3], "source": [0, 1, 1, 1]})
    for test_size in (1, 2):
        trained, held_out = split_held_out(rows, test_size, 0)
        assert len(held_out) == test_size
        assert sorted(map(str, [*trained, *held_out])) == sorted(map(str, rows))
    single = datasets.Dataset.from_dict({"row": [1, 1], "source": [0, 1]})
    trained, held_out = split_held_out(single, 1, 0)
    assert (trained["source"][:], held_out["source"][:]) == ([1], [0])


# --- labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (["data/alpaca.jsonl", "databricks/databricks-dolly-15k"], ["alpaca", "databricks-dolly-15k"]),
        (["a/train.json", "b/train.parquet", "demo"], ["a-train", "b-train", "demo"]),
        (["x/rows.jsonl.gz", "rows.v2.csv", "folder/"], ["rows", "rows.v2", "folder"]),
        (["Rows.json", "rows.csv"], ["Rows", "rows-2"]),  # differ on some disks only
        (["a/x/1.json", "b/x/1.json"], ["x-1", "x-1-2"]),
        (["my rows (new).json", "数据.json", "."], ["my-rows-new", "rows", "rows-2"]),
        (["a" * 90 + ".json"], ["a" * 40]),
    ],
)
def test_a_source_is_labelled_by_its_name(sources: list[str], labels: list[str]) -> None:
    assert source_labels(sources) == labels
