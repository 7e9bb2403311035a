"""How many rows are held out, by default and as typed, and which ones."""

from __future__ import annotations

import datasets
import pytest

from training.data.held_out import (
    asked_in_training,
    default_size,
    held_out_message,
    held_out_size,
    split_held_out,
)
from training.errors import DataError


def test_by_default_a_tenth_of_the_rows_is_held_out_and_at_most_dollys_thousand() -> None:
    counts = [2, 19, 20, 300, 1001, 9999, 10_010, 52_002]
    assert [held_out_size(None, count) for count in counts] == [1, 1, 2, 30, 100, 999, 1000, 1000]


def test_a_typed_number_up_to_half_of_the_rows_is_taken() -> None:
    for typed, count in ((1, 2), (1, 3), (10, 20), (500, 1001), (5000, 52_002)):
        assert held_out_size(typed, count) == typed


@pytest.mark.parametrize(
    ("typed", "count", "message"),
    [
        (501, 1001, "--test-size 501 is more than half of the 1,001 rows. Type --test-size 100, or another number up to 500"),
        (1000, 1001, "Type --test-size 100,"),
        (2, 3, "Type --test-size 1, or another number up to 1"),
        (60_000, 52_002, "Type --test-size 1000, or another number up to 26001"),
        (0, 20, "--test-size 0 holds out no rows. Type --test-size 2,"),
        (None, 0, "--training-dataset: no rows, but at least 2 are needed: one to train on and one to hold out. Name"),
        (1000, 1, "--training-dataset: 1 row, but at least 2 are needed"),
    ],
)  # fmt: skip
def test_a_number_that_leaves_too_little_is_refused_with_the_number_to_type(
    typed: int | None, count: int, message: str
) -> None:
    with pytest.raises(DataError) as refused:
        held_out_size(typed, count)
    assert message in str(refused.value)


def test_a_resume_keeps_the_number_of_its_run_unless_another_one_is_typed() -> None:
    assert held_out_size(None, 1001, recorded=1000) == 1000
    assert held_out_size(1000, 1001, recorded=1000) == 1000
    assert held_out_size(50, 1001, recorded=1000) == 50
    assert held_out_size(None, 900, recorded=1000) == default_size(900), "the rows are others"
    with pytest.raises(DataError, match="more than half"):
        held_out_size(1000, 1001, recorded=100)


def test_the_log_says_where_the_number_comes_from() -> None:
    assert held_out_message(50, 1001, 50) == "50 of 1,001 rows are held out"
    assert (
        held_out_message(100, 1001, None)
        == "100 of 1,001 rows are held out; --test-size chooses another number"
    )
    assert held_out_message(1000, 1001, None, 1000).endswith("are held out, as in the run that is resumed")


def test_the_split_is_the_same_as_dollys() -> None:
    rows = datasets.Dataset.from_dict({"row": list(range(1, 101))})
    train, held_out = split_held_out(rows, 10, seed=42)
    dollys = rows.shuffle(seed=42).train_test_split(test_size=10, seed=42)
    assert train["row"][:] == dollys["train"]["row"][:]
    assert held_out["row"][:] == dollys["test"]["row"][:]
    assert sorted([*train["row"], *held_out["row"]]) == list(range(1, 101))
    assert split_held_out(rows, 10, seed=43)[1]["row"][:] != held_out["row"][:]


def test_held_out_rows_that_ask_the_same_as_a_training_row_are_counted() -> None:
    def rows(*parts: tuple[list[int], list[list[int]]]) -> datasets.Dataset:
        ids, spans = zip(*parts, strict=True)
        return datasets.Dataset.from_dict({"input_ids": ids, "response_spans": spans})

    train = rows(([1, 2, 3, 9], [[2, 4]]), ([7, 8, 4, 5, 6, 9], [[1, 2], [4, 6]]), ([5, 5], [[1, 2]]))
    held_out = rows(
        ([1, 2, 3, 9], [[2, 4]]),  # the first row again
        ([1, 2, 4], [[2, 3]]),  # its question, with another answer
        ([1, 3, 3, 9], [[2, 4]]),
        ([7, 8, 4, 5, 9], [[1, 2], [4, 5]]),  # the second row's last question after the same turn
        ([7, 3, 4, 5, 9], [[1, 2], [4, 5]]),  # after another answer
        ([7, 8, 4, 5, 9], [[1, 2], [3, 5]]),
    )
    assert asked_in_training(train, held_out) == 3
    assert asked_in_training(train.select([2, 0]), held_out.select([2, 0, 1])) == 2
