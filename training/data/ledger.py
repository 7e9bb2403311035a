"""Counts how many rows were kept, dropped or truncated, with reasons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.errors import DataError, printable
from training.files import write_json

if TYPE_CHECKING:
    from training.data.conversations import ConversationError

EMPTY_RESPONSE = "empty response"
EMPTY_INSTRUCTION = "empty instruction"
PROMPT_TOO_LONG = "prompt alone fills max_length"
RESPONSE_CUT = "response would be cut at max_length"
HISTOGRAM_EDGES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
HISTOGRAM_NAMES = [*(f"<={edge}" for edge in HISTOGRAM_EDGES), f">{HISTOGRAM_EDGES[-1]}"]
FIRST_DROPPED = 10  # rows that are named for each reason
NO_SUMS = ("max_length", "longest_row")  # numbers of a ledger that are no sums over several sources


@dataclass
class Ledger:
    """Counts of kept, dropped and truncated rows. Row numbers count from 1 in the order of the source.

    The ledger of a run with several sources holds one for each of them, and their totals. There a row number counts
    through all sources, in their order.

    Attributes:
        files: rows of each file of a folder, in the order of the rows.
        not_read: what the source holds besides instruction, input and output, such as "the column 'category'".
        turns: questions with an answer in the rows kept.
        rows_shortened: conversations too long for `max_length`, whose last `turns_left_out` turns are left out.
        unanswered: conversations whose last question has no answer, and is left out.
        unusable: the first conversations that cannot be used, in words.
        sources: the ledgers of the sources if there are several. A file without this key is of a single source.
    """

    source: str
    max_length: int
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped_rows: dict[str, list[int]] = field(default_factory=dict)
    rows_truncated: int = 0
    tokens: int = 0
    response_tokens: int = 0
    longest_row: int = 0
    length_histogram: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)
    turns: int = 0
    rows_shortened: int = 0
    turns_left_out: int = 0
    unanswered: int = 0
    unusable: list[str] = field(default_factory=list)
    sources: list[Ledger] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Ledger:
        """The ledger of a file that `save` wrote. Raises OSError, or another error if it is damaged."""
        entries = json.loads(file.read_text())
        return cls(**entries | {"sources": [cls(**source) for source in entries.get("sources", ())]})

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        first = self.first_dropped_rows.setdefault(reason, [])
        if len(first) < FIRST_DROPPED:
            first.append(row)

    def drop_unusable(self, error: ConversationError, row: int) -> None:
        """Counts a conversation that cannot be used."""
        self.drop(error.reason, row)
        if len(self.unusable) < FIRST_DROPPED:
            place = self.place(row) if self.files else f"row {row}"
            self.unusable.append(f"{place}{error.place}: {error}")

    def count_turns(self, kept: int, of: int) -> None:
        """Counts the turns of a row that is kept."""
        self.turns += kept
        self.turns_left_out += of - kept
        self.rows_shortened += kept < of

    def place(self, row: int) -> str:
        """A row by its number; with several sources by its source, in a folder by its file: "part-00001.parquet row 8"."""
        for ledger in self.sources:
            if row <= ledger.rows_read:
                place = ledger.place(row)
                return f"{ledger.source} {place if ledger.files else f'row {place}'}"
            row -= ledger.rows_read
        for file, count in self.files.items():
            if row <= count:
                return f"{file} row {row}"
            row -= count
        return str(row)

    def places(self, rows: Sequence[tuple[int, int]]) -> str:
        """Names rows of (source, number in it): "rows 2, 9 of a.json and row 4 of b.json"."""
        ledgers = self.sources or [self]
        numbers: dict[int, list[int]] = {}
        for source, row in sorted(rows):
            numbers.setdefault(source, []).append(row)
        listed = (
            f"row{'s' * (len(found) > 1)} {', '.join(map(ledgers[source].place, found))} of {ledgers[source].source}"
            for source, found in numbers.items()
        )
        return printable(" and ".join(listed))

    def as_dict(self) -> dict[str, Any]:
        """The entries of the file. Only the ledger of several sources has the key `sources`."""
        entries = asdict(self)
        sources = [source.as_dict() for source in self.sources]
        del entries["sources"]
        return entries | ({"sources": sources} if sources else {})

    def save(self, path: Path) -> None:
        write_json(path, self.as_dict())

    def __str__(self) -> str:
        name = f"{len(self.sources)} sources" if self.sources else self.source
        lines = [
            f"{name}: {self.rows_read:,} rows read, {self.rows_kept:,} kept, "
            f"{self.rows_truncated:,} truncated at {self.max_length:,} tokens; {self.tokens:,} tokens, "
            f"{self.response_tokens:,} of them in responses, longest row {self.longest_row:,}"
        ]
        if self.sources:
            return "\n".join([*map(str, self.sources), *lines])
        if self.files:
            names = list(self.files)
            last = f" to {names[-1]}" if names[1:] else ""
            lines.append(f"  from {len(names):,} file{'s' if last else ''}: {names[0]}{last}")
        if self.not_read:
            lines.append(f"  not read: {'; '.join(self.not_read)}")
        if self.turns > self.rows_kept:
            lines.append(f"  conversations: {self.turns:,} turns in {self.rows_kept:,} rows")
        if self.rows_shortened:
            lines.append(
                f"  {self.rows_shortened:,} conversations are longer than {self.max_length:,} tokens: "
                f"their last {self.turns_left_out:,} turns are left out"
            )
        if self.unanswered:
            lines.append(f"  {self.unanswered:,} conversations end with a question, which is left out")
        for reason, count in self.dropped.items():
            rows = ", ".join(map(self.place, self.first_dropped_rows[reason]))
            lines.append(f"  dropped {count:,}: {reason} (first rows: {rows})")
        lines.append("  tokens a row: " + "  ".join(f"{k}: {v:,}" for k, v in self.length_histogram.items()))
        return printable("\n".join(lines))  # the names of files and columns


def total_of(ledgers: Sequence[Ledger]) -> Ledger:
    """The ledger of several sources: their sums, with their ledgers. That of a single source is its own."""
    if len(ledgers) == 1:
        return ledgers[0]
    total = Ledger(", ".join(ledger.source for ledger in ledgers), ledgers[0].max_length)
    total.longest_row = max(ledger.longest_row for ledger in ledgers)
    numbers = [name for name, value in vars(total).items() if isinstance(value, int) and name not in NO_SUMS]
    for ledger in ledgers:
        before = total.rows_read
        for name in numbers:
            setattr(total, name, getattr(total, name) + getattr(ledger, name))
        for counts, added in (
            (total.dropped, ledger.dropped),
            (total.length_histogram, ledger.length_histogram),
        ):
            counts |= {key: counts.get(key, 0) + count for key, count in added.items()}
        for reason, rows in ledger.first_dropped_rows.items():
            first = total.first_dropped_rows.setdefault(reason, [])
            first += [before + row for row in rows][: FIRST_DROPPED - len(first)]
    counts = total.length_histogram
    total.length_histogram = {name: counts[name] for name in HISTOGRAM_NAMES if name in counts}
    total.sources = list(ledgers)
    return total


def length_histogram(sizes: np.ndarray) -> dict[str, int]:
    """Counts rows by length: {"<=32": rows of at most 32 tokens, ...}, without empty bins."""
    counts = np.bincount(np.searchsorted(HISTOGRAM_EDGES, sizes), minlength=len(HISTOGRAM_EDGES) + 1)
    return {name: int(count) for name, count in zip(HISTOGRAM_NAMES, counts, strict=True) if count}


def check_dropped(
    ledger: Ledger, limit: float, positions: int | None = None, drop_unusable: bool = False
) -> None:
    """Raises DataError if no row is kept, or if more than the fraction `limit` of the rows is dropped.

    Unless `drop_unusable`, also for a conversation that cannot be used.

    `positions`: largest --max-length that the model allows; None if it cannot be raised.
    """
    if ledger.unusable and not drop_unusable:
        causes = (
            EMPTY_RESPONSE,
            EMPTY_INSTRUCTION,
            PROMPT_TOO_LONG,
            RESPONSE_CUT,
        )  # of all other dropped rows
        count = sum(ledger.dropped.values()) - sum(ledger.dropped.get(cause, 0) for cause in causes)
        others = count - len(ledger.unusable)
        rest = [f"and {others:,} more: {count:,} of {ledger.rows_read:,} rows"] if others else []
        more = "\n  ".join(["", *ledger.unusable[1:], *rest])
        raise DataError(
            f"{ledger.source}, {ledger.unusable[0]}{printable(more)}\n"
            "Correct these conversations, or type --drop-unusable to leave out all that cannot be used"
        )
    dropped = sum(ledger.dropped.values())
    if ledger.rows_kept == 0 or dropped > limit * ledger.rows_read:
        advice = "Correct the rows"
        if (
            positions
            and positions > ledger.max_length
            and {PROMPT_TOO_LONG, RESPONSE_CUT} & set(ledger.dropped)
        ):
            advice += f", raise --max-length to at most {positions}"
        if ledger.rows_kept:
            advice += ", or raise --max-dropped-fraction"
        more_than = f"more than {limit:.0%} (--max-dropped-fraction {limit:g})"
        too_many = more_than if ledger.rows_kept else "and none is left"
        raise DataError(
            f"{dropped:,} of {ledger.rows_read:,} rows would be dropped, {too_many}.\n{ledger}\n{advice}"
        )
