"""The rows of an evaluation: those that a run held out, found again from its record, or those of a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from training.consts import DEFAULT_SEED, LEDGER_FILE
from training.data.columns import Columns
from training.data.conversations import row_turns
from training.data.held_out import rows_digest, source_of_each, split_held_out
from training.data.rows import read_columns
from training.data.source_labels import source_labels
from training.data.source_names import joined, sources_of
from training.data.sources import PER_ROW, places_of, read_sources
from training.data.tokens import prepare_sources
from training.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Rows to evaluate models on, in a seeded order.

    Attributes:
        columns: instruction, input, output, history and, if the source has it, category of each row. The output is the
            answer that is scored.
        numbers: number of each row in its source, from 1.
        source: the file, dataset or "demo" that they come from.
        of: number of rows that could have been chosen.
        chosen: how they were chosen, in words.
        max_length: the longest row in tokens that training kept; None for the limit of the model.
        keep_truncated: whether training cut longer rows there, instead of dropping them.
        dropped: rows of the source that cannot be used, by reason.
        sources: the label of the source of each row; empty if all come from one.
        shortened: number of conversations whose last turns are left out, because they are too long.
    """

    columns: Columns
    numbers: list[int]
    source: str
    of: int
    chosen: str
    max_length: int | None = None
    keep_truncated: bool = False
    dropped: Mapping[str, int] | None = None
    sources: Sequence[str] = ()
    shortened: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self, limit: int | None) -> Rows:
        """The first `limit` rows; all for None."""
        if limit is None or limit >= len(self):
            return self
        return replace(self.at(range(limit)), chosen=f"the first {limit:,} of {self.chosen}")

    def at(self, places: Sequence[int]) -> Rows:
        """The rows at these places."""
        return replace(
            self,
            columns=_at(self.columns, places),
            numbers=[self.numbers[i] for i in places],
            sources=[self.sources[i] for i in places] if self.sources else (),
        )

    def first_turns(self, counts: Sequence[int]) -> Rows:
        """The rows with their first turns, as many as `counts` says for each: the answer of the last one is scored."""
        columns, shortened = _first_turns(self.columns, counts)
        return replace(self, columns=columns, shortened=shortened)


def _at(columns: Columns, places: Sequence[int]) -> Columns:
    parts = {
        name: [getattr(columns, name)[place] for place in places]
        for name in PER_ROW
        if getattr(columns, name)
    }
    return Columns(**{"instruction": [], "input": [], "output": []} | parts)


def _first_turns(columns: Columns, counts: Sequence[int]) -> tuple[Columns, int]:
    """(columns with the first turns of each row, number of rows that lost any)."""
    whole = [row_turns(columns, row) for row in range(len(columns))]
    if [len(turns) for turns in whole] == list(counts):
        return columns, 0
    last = [turns[count - 1] for turns, count in zip(whole, counts, strict=True)]
    history = [turns[: count - 1] for turns, count in zip(columns.history, counts, strict=True)]
    shortened = sum(len(turns) > count for turns, count in zip(whole, counts, strict=True))
    instruction, input, output = (list(texts) for texts in zip(*last, strict=True))
    return Columns(instruction, input, output, category=columns.category, history=history), shortened


def held_out_rows(folder: Path, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows that a finished run held out, in the order of its seeded shuffle.

    They are found as training found them: all rows are tokenised, and the same shuffle and split are applied. The
    checksum in the record proves that they are the same.

    Args:
        record: the run's record, from the `folder` of its model.
        tokenizer: the one in that folder, which gives the same ids as in training.

    Raises DataError if the data is gone or has changed.
    """
    run = record["options"]
    sources, selection = sources_of(run["training_dataset"]), _selection(run)
    advice = "Name other rows with --rows FILE; they must be rows that the model was not trained on"
    max_length = _max_length(folder, run, tokenizer)
    try:
        prepared, _ = prepare_sources(
            sources,
            tokenizer,
            max_length,
            run.get("keep_truncated", False),
            run.get("max_dropped_fraction", 1.0),
            selection=selection,
            drop_unusable=run.get("drop_unusable", False),
        )
        columns, starts = read_sources(sources, selection)
    except DataError as error:
        raise DataError(f"the rows that the run held out cannot be read: {error}. {advice}") from error
    if not isinstance(run.get("test_size"), int):
        raise DataError(f"the record of the run does not say how many rows it held out. {advice}")
    parts = split_held_out(prepared, run["test_size"], run["seed"])
    if record.get("rows") not in (None, rows_digest(*parts)):
        raise DataError(
            f"{joined(sources)}: has changed since the run was trained on it, or is another file of this name, so the rows that "
            f"the run held out are not known. {advice}"
        )
    held_out = parts[1]
    labels = source_labels(sources)
    return Rows(
        _at(columns, places_of(held_out, starts)),
        held_out["row"][:],
        joined(sources),
        len(held_out),
        f"the {len(held_out):,} rows that the run held out (seed {run['seed']})",
        max_length,
        run.get("keep_truncated", False),
        sources=[labels[source] for source in source_of_each(held_out)] if len(sources) > 1 else (),
    )


def _selection(run: Mapping[str, Any]) -> dict[str, str]:
    """The part of a dataset on the Hub that the run chose."""
    parts = {key: run.get(f"dataset_{key}") for key in ("config", "split", "revision")}
    return {key: text for key, text in parts.items() if text is not None}


def _max_length(folder: Path, run: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest row in tokens that training kept: an option, or a limit of the architecture that the ledger has."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / LEDGER_FILE).read_text())["max_length"])
    return int(run.get("max_length") or tokenizer.model_max_length)


def file_rows(source: str) -> Rows:
    """The rows of a file, a folder or a dataset on the Hub, in a seeded order. Raises DataError without usable rows."""
    columns = read_columns(source)
    reasons = [_unusable(columns, row) for row in range(len(columns))]
    usable = [row for row, reason in enumerate(reasons) if reason is None]
    dropped = Counter(reason for reason in reasons if reason is not None)
    if not usable:
        found = ", ".join(f"{count:,} rows: {reason}" for reason, count in dropped.items())
        raise DataError(
            f"{source}: no row has an instruction and an output ({found}). An evaluation compares answers with the "
            "outputs"
        )
    places = [usable[i] for i in np.random.default_rng(DEFAULT_SEED).permutation(len(usable))]
    return Rows(
        _at(columns, places),
        [place + 1 for place in places],
        source,
        len(places),
        f"the {len(places):,} rows of {source} (in an order of seed {DEFAULT_SEED})",
        dropped=dict(dropped) or None,
    )


def _unusable(columns: Columns, row: int) -> str | None:
    """Why training would not use a row; None if it would."""
    if row in columns.unusable:
        return columns.unusable[row].reason
    turns = row_turns(columns, row)
    filled = all(instruction.strip() and output.strip() for instruction, _, output in turns)
    return None if filled else "empty instruction or output"
