"""Chooses how many rows are held out, by one rule for trainer, plan, notebook and flow, and which ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from training.consts import DEFAULT_TEST_SIZE
from training.errors import DataError

if TYPE_CHECKING:
    import datasets


def default_size(rows: int) -> int:
    """Rows to hold out where --test-size was not typed: a tenth, at least 1 and at most 1,000, which are Dolly's."""
    return max(1, min(DEFAULT_TEST_SIZE, rows // 10))


def held_out_size(typed: int | None, rows: int, recorded: int | None = None) -> int:
    """The number of `rows` to hold out.

    Args:
        typed: --test-size; None if it was not typed.
        recorded: the number of the run that is resumed; it is kept unless another one was typed.

    Raises DataError if there are fewer than 2 rows, or if the typed number is more than half of them.
    """
    if rows < 2:
        found = "1 row" if rows else "no rows"
        raise DataError(
            f"--training-dataset: {found}, but at least 2 are needed: one to train on and one to hold out. Name a "
            "larger dataset"
        )
    if recorded is not None and typed in (None, recorded) and 0 < recorded < rows:
        return recorded
    if typed is None:
        return default_size(rows)
    if not 0 < typed <= rows // 2:
        wrong = "holds out no rows" if typed < 1 else f"is more than half of the {rows:,} rows"
        raise DataError(
            f"--test-size {typed} {wrong}. Type --test-size {default_size(rows)}, or another number up to {rows // 2}"
        )
    return typed


def held_out_message(size: int, rows: int, typed: int | None, recorded: int | None = None) -> str:
    """Says how many rows are held out and, if the number was not typed, where it comes from."""
    why = "" if typed == size else "; --test-size chooses another number"
    if why and size == recorded:
        why = ", as in the run that is resumed"
    return f"{size:,} of {rows:,} rows are held out{why}"


def split_held_out(
    rows: datasets.Dataset, test_size: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Shuffles and splits into (training rows, held-out rows), with the same two calls as Dolly.

    Rows of several sources have the column `source`. Each source gives `held_out_shares` of them, with the same two
    calls. Its training rows follow those of the source before it, because training shuffles them. The held-out rows are
    shuffled, so that the first of them are a mixture.
    """
    if "source" not in rows.column_names:
        parts = rows.shuffle(seed=seed).train_test_split(test_size=test_size, seed=seed)
        return parts["train"], parts["test"]
    import datasets

    counts, train, held_out = np.bincount(rows["source"][:]).tolist(), [], []
    end = 0
    for count, share in zip(counts, held_out_shares(counts, test_size), strict=True):
        start, end = end, end + count
        shuffled = rows.select(range(start, end)).shuffle(seed=seed)
        if 0 < share < count:
            parts = shuffled.train_test_split(test_size=share, seed=seed)
            train.append(parts["train"])
            held_out.append(parts["test"])
        else:
            (held_out if share else train).append(shuffled)
    return datasets.concatenate_datasets(train), datasets.concatenate_datasets(held_out).shuffle(seed=seed)


def held_out_shares(counts: Sequence[int], test_size: int) -> list[int]:
    """How many of the `test_size` held-out rows each source gives, in proportion to its `counts` rows.

    The rows left by rounding down go to the largest remainders. A source of 2 or more rows gives at least one, if
    test_size is large enough for that.

        [900, 90, 10, 2], 20  ->  [16, 2, 1, 1]
    """
    smallest = sum(count > 1 for count in counts) <= test_size
    shares: dict[int, int] = {}  # of the sources that proportion would give less than one row
    while True:
        rest = [source for source in range(len(counts)) if source not in shares]
        size, total = test_size - len(shares), sum(counts[source] for source in rest)
        small = [
            source for source in rest if smallest and counts[source] > 1 and size * counts[source] < total
        ]
        if not small:
            break
        shares |= dict.fromkeys(small, 1)
    shares |= {source: size * counts[source] // total for source in rest}
    # Between equal remainders the larger source gives the row.
    rest.sort(key=lambda source: (size * counts[source] % total, counts[source]), reverse=True)
    for source in rest[: test_size - sum(shares.values())]:
        shares[source] += 1
    return [shares[source] for source in range(len(counts))]


def source_of_each(rows: datasets.Dataset) -> list[int]:
    """Number of the source of each tokenised row, from 0. Those of a single source have no such column."""
    return rows["source"][:] if "source" in rows.column_names else [0] * len(rows)


def asked_in_training(train_rows: datasets.Dataset, held_out_rows: datasets.Dataset) -> int:
    """How many held-out rows ask the same as a training row: their ids are equal up to the last response."""
    asked = set(_prompts(train_rows))
    return sum(prompt in asked for prompt in _prompts(held_out_rows))


def _prompts(rows: datasets.Dataset) -> Iterator[bytes]:
    """A checksum of each row's ids up to its last response."""
    for ids, lengths, spans, counts in _batches(rows):
        starts = np.cumsum(lengths) - lengths
        for start, last in zip(starts.tolist(), spans[np.cumsum(counts) - 1, 0].tolist(), strict=True):
            yield hashlib.blake2b(ids[start : start + last].tobytes(), digest_size=16).digest()


def _batches(rows: datasets.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(ids one row after the other, ids of each row, spans (spans, 2), spans of each row) of 10,000 rows at a time.

    Ids and spans are int32.
    """
    import pyarrow.compute

    for table in rows.with_format("arrow").iter(batch_size=10_000):
        ids, spans = (table[name].combine_chunks() for name in ("input_ids", "response_spans"))
        lengths, counts = (pyarrow.compute.list_value_length(lists).to_numpy() for lists in (ids, spans))
        edges = spans.flatten().flatten().to_numpy().astype(np.int32, copy=False).reshape(-1, 2)
        yield ids.flatten().to_numpy().astype(np.int32, copy=False), lengths, edges, counts


def rows_digest(*parts: datasets.Dataset) -> str:
    """A checksum of the training rows and the held-out rows, in their order.

    It changes with data, tokenizer, length, split and seed. Where each row is a single turn, it is that of runs from
    before conversations were read.
    """
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8))
        for ids, _, spans, counts in _batches(rows):
            firsts = np.cumsum(counts) - counts
            digest.update(ids.tobytes() + spans[firsts, 0].tobytes())
            for number in np.flatnonzero(counts > 1).tolist():
                of_row = spans[firsts[number] : firsts[number] + counts[number]]
                digest.update(np.int32(number).tobytes() + of_row.tobytes())
    return digest.hexdigest()
