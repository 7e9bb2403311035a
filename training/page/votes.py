"""Blind votes: pairs of answers in random order, the file of votes, and the share of votes that a model wins.

A vote is a line of JSON. "a" and "b" are the answers in the order in which they were shown:

    {"time": "2026-12-01T10:00:00Z", "source": "held-out", "instruction": "Name a river.", "input": "",
     "a": {"name": "dolly", "id": "9085ec51", "answer": "The Rhine"}, "b": {...}, "vote": "a",
     "generation": {"max_new_tokens": 256, ...}}

A vote is "a", "b" or "tie". The source is "held-out" for a row, and "own" for a question that somebody typed. A row of
several turns has "history" as well: the messages before its last question, {"role": "user", "content": "..."}."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training.consts import RUN_FILE
from training.data.conversations import Prompt, prompt_of_row, row_of_prompt
from training.errors import DataError

if TYPE_CHECKING:
    from training.page.models import PageModel

logger = logging.getLogger(__name__)

HELD_OUT, OWN = "held-out", "own"
CHOICES = ("a", "b", "tie")
Z_95 = 1.959964  # 97.5% quantile of the normal distribution

# Python's generator would be predictable from the orders that it has shown.
_random = random.SystemRandom()


class Question(NamedTuple):
    """What the models are asked, and where it comes from."""

    prompt: Prompt
    source: str


@dataclass
class Pair:
    """Two models and their answers, in the order in which the page shows them."""

    question: Question
    models: tuple[PageModel, PageModel]
    answers: tuple[str, str]
    generation: dict[str, Any]
    vote: str | None = None


@dataclass
class Tally:
    """The votes on two models. `rate` is the share that the first one wins; a tie is half a win for each."""

    wins: int
    ties: int
    losses: int

    @property
    def count(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / self.count

    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.rate, self.count)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` votes, by Wilson's score (Wilson 1927, Journal of the ASA 22).

    A tie counts as half a win. Votes with ties vary less than votes without, so the interval is then rather too wide.
    """
    square = Z_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    margin = Z_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - margin), min(1.0, middle + margin)


def file_problem(file: Path, models: Sequence[str]) -> str | None:
    """Why votes cannot be kept in `file`, with what to type instead; None if they can. `models` are names or folders."""
    try:
        place = file.expanduser().resolve()
        folders = {Path(model).resolve() for model in models if os.path.isdir(model)}
        inside = next(
            (folder for folder in place.parents if folder in folders or (folder / RUN_FILE).is_file()), None
        )
        if inside:
            return (
                f"lies in {inside}, the folder of a model, which is published as it is. Name a file elsewhere"
            )
        read(place)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror}). Name another file"
    return None


def read(file: Path) -> list[dict[str, Any]]:
    """The votes of a file, in order; [] if it does not exist. Lines that a killed page left incomplete are skipped.

    Raises DataError if a line is JSON but no vote, and OSError.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    votes, incomplete = [], []
    lines = text.split("\n")  # not splitlines: U+2028 is legal inside a string
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            vote = json.loads(line)
        except (ValueError, RecursionError):
            incomplete.append(number)
            continue
        if not _is_vote(vote):
            raise DataError(f"line {number} is no vote of this page. Name another file")
        votes.append(vote)
    if incomplete and not votes:
        raise DataError(f"line {incomplete[0]} is no vote of this page. Name another file")
    if incomplete:
        logger.warning(
            "%s: %d incomplete lines are skipped, the first is line %d", file, len(incomplete), incomplete[0]
        )
    return votes


def _is_vote(vote: Any) -> bool:
    try:
        texts = [vote["instruction"], vote["input"], vote["source"]]
        texts += [vote[side][key] for side in "ab" for key in ("name", "id", "answer")]
        prompt_of_row(vote)
        return all(isinstance(text, str) for text in texts) and vote["vote"] in CHOICES
    except (KeyError, TypeError, DataError):
        return False


@dataclass
class Votes:
    """The votes of all users of the page, in memory and in their file."""

    file: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, file: Path) -> Votes:
        """Raises DataError and OSError, as `read` does."""
        file = file.expanduser()
        return cls(file, read(file))

    def add(self, pair: Pair, choice: str) -> None:
        """Writes the vote on a pair to the disk. A second vote on the same pair changes nothing.

        Raises OSError if it cannot be written. Then it is not counted, and can be given again.
        """
        sides = [
            {"name": model.name, "id": model.identity, "answer": answer}
            for model, answer in zip(pair.models, pair.answers, strict=True)
        ]
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": pair.question.source,
            **row_of_prompt(pair.question.prompt),
            "a": sides[0],
            "b": sides[1],
            "vote": choice,
            "generation": pair.generation,
        }
        with self.lock:
            if pair.vote is None:
                append(self.file, entry)
                self.entries.append(entry)
                pair.vote = choice

    def tally(self, first: PageModel, second: PageModel) -> Tally:
        """All votes on two models, also those of other days."""
        wins = ties = losses = 0
        for entry in self._of(first, second):
            if entry["vote"] == "tie":
                ties += 1
            elif entry[entry["vote"]]["id"] == first.identity:
                wins += 1
            else:
                losses += 1
        return Tally(wins, ties, losses)

    def voted(self, first: PageModel, second: PageModel) -> set[Prompt]:
        """The held-out rows on which somebody has voted for these models."""
        return {prompt_of_row(entry) for entry in self._of(first, second) if entry["source"] == HELD_OUT}

    def _of(self, first: PageModel, second: PageModel) -> list[dict[str, Any]]:
        identities = {first.identity, second.identity}
        return [entry for entry in self.entries if {entry["a"]["id"], entry["b"]["id"]} == identities]


def append(file: Path, entry: dict[str, Any]) -> None:
    """Appends a line and waits until the disk has it. Ends an incomplete last line first, and leaves none. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    with open(file, "ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else b"\n" + line
        try:
            written = stream.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(size)
            raise


def next_row(
    rows: Sequence[Question], models: Sequence[PageModel], votes: Votes
) -> tuple[Question, tuple[PageModel, PageModel]] | None:
    """A held-out row on which nobody has voted, and the two models to ask in random order; None if none is left.

    Of more than two models, the two with the fewest votes on rows are compared.
    """
    pairs = list(combinations(models, 2))
    _random.shuffle(pairs)
    for pair in sorted(pairs, key=lambda pair: len(votes.voted(*pair))):
        voted = votes.voted(*pair)
        if left := [row for row in rows if row.prompt not in voted]:
            return _random.choice(left), in_random_order(pair)
    return None


def in_random_order(models: Sequence[PageModel]) -> tuple[PageModel, PageModel]:
    """Two of the models, in random order."""
    first, second = _random.sample(list(models), 2)
    return first, second
