"""Counts how many rows were kept, dropped or truncated, with reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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


@dataclass
class Ledger:
    """Counts of kept, dropped and truncated rows. Row numbers count from 1 in the order of the source.

    Attributes:
        files: rows of each file of a folder, in the order of the rows.
        not_read: what the source holds besides instruction, input and output, such as "the column 'category'".
        turns: questions with an answer in the rows kept.
        rows_shortened: conversations too long for `max_length`, whose last `turns_left_out` turns are left out.
        unanswered: conversations whose last question has no answer, and is left out.
        unusable: the first conversations that cannot be used, in words.
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

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        first = self.first_dropped_rows.setdefault(reason, [])
        if len(first) < 10:
            first.append(row)

    def drop_unusable(self, error: ConversationError, row: int) -> None:
        """Counts a conversation that cannot be used."""
        self.drop(error.reason, row)
        if len(self.unusable) < 10:
            place = self.place(row) if self.files else f"row {row}"
            self.unusable.append(f"{place}{error.place}: {error}")

    def count_turns(self, kept: int, of: int) -> None:
        """Counts the turns of a row that is kept."""
        self.turns += kept
        self.turns_left_out += of - kept
        self.rows_shortened += kept < of

    def place(self, row: int) -> str:
        """A row by its number, and in a folder by its file: "part-00001.parquet row 8"."""
        for file, count in self.files.items():
            if row <= count:
                return f"{file} row {row}"
            row -= count
        return str(row)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.rows_read:,} rows read, {self.rows_kept:,} kept, "
            f"{self.rows_truncated:,} truncated at {self.max_length:,} tokens; {self.tokens:,} tokens, "
            f"{self.response_tokens:,} of them in responses, longest row {self.longest_row:,}"
        ]
        if self.files:
            names = list(self.files)
            last = f" to {names[-1]}" if names[1:] else ""
            lines.append(f"  from {len(names):,} file{'s' if last else ''}: {names[0]}{last}")
        if self.not_read:
            lines.append(f"  not read: {'; '.join(self.not_read)}")
        if self.turns > self.rows_kept:
            lines.append(f"  conversations: {self.turns:,} turns")
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


def length_histogram(sizes: np.ndarray) -> dict[str, int]:
    """Counts rows by length: {"<=32": rows of at most 32 tokens, ...}, without empty bins."""
    counts = np.bincount(np.searchsorted(HISTOGRAM_EDGES, sizes), minlength=len(HISTOGRAM_EDGES) + 1)
    names = [f"<={edge}" for edge in HISTOGRAM_EDGES] + [f">{HISTOGRAM_EDGES[-1]}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def check_dropped(
    ledger: Ledger, limit: float, positions: int | None = None, drop_unusable: bool = False
) -> None:
    """Raises DataError if no row is kept, or if more than the fraction `limit` of the rows is dropped.

    Unless `drop_unusable`, also for a conversation that cannot be used.

    `positions`: largest --max-length that the model allows; None if it cannot be raised.
    """
    if ledger.unusable and not drop_unusable:
        more = "\n  ".join(["", *ledger.unusable[1:]])
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
        raise DataError(
            f"{dropped:,} of {ledger.rows_read:,} rows would be dropped, more than "
            f"{limit:.0%} (--max-dropped-fraction {limit:g}).\n{ledger}\n"
            f"{advice}"
        )
