"""Chooses how many rows are held out, by one rule for trainer, plan, notebook and flow, and which ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from training.consts import DEFAULT_TEST_SIZE
from training.errors import DataError, TooFewRowsError

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
        raise TooFewRowsError("--training-dataset", rows)
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
    """Shuffles and splits into (training rows, held-out rows), with the same two calls as Dolly."""
    parts = rows.shuffle(seed=seed).train_test_split(test_size=test_size, seed=seed)
    return parts["train"], parts["test"]


def rows_digest(*parts: datasets.Dataset) -> str:
    """A checksum of the training rows and the held-out rows, in their order.

    It changes with data, tokenizer, length, split and seed. Where each row is a single turn, it is that of runs from
    before conversations were read.
    """
    import numpy as np

    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8))
        for batch in rows.with_format("numpy").iter(batch_size=10_000):
            for ids in batch["input_ids"]:
                digest.update(np.asarray(ids, dtype=np.int32).tobytes())
            spans = [np.asarray(of_row, dtype=np.int32).reshape(-1, 2) for of_row in batch["response_spans"]]
            digest.update(np.array([of_row[0, 0] for of_row in spans], dtype=np.int32).tobytes())
            for number, of_row in enumerate(spans):
                if len(of_row) > 1:
                    digest.update(np.int32(number).tobytes() + of_row.tobytes())
    return digest.hexdigest()
