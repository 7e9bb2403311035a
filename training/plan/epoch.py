"""The lengths of the rows, and the work of an epoch of them for the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.consts import DEFAULT_TRAINING_DATASET, LARGEST_SHARE, PAD_TO_MULTIPLE_OF

if TYPE_CHECKING:
    import numpy as np

    from training.options.settings import Settings


@dataclass(frozen=True)
class Lengths:
    """The rows of a dataset: `tokens (rows,) int64`, and the share of all tokens that are response tokens."""

    source: str
    tokens: np.ndarray
    response_share: float


ALPACA_ROWS = 52_002
ALPACA_RESPONSE_SHARE = 0.569

# Rows of lengths 1-8, 9-16, ... tokens among 1,500 rows of Alpaca drawn at random, tokenised by training.data with
# GPT-2's BPE, the control tokens being one token each: mean 106.7, median 91, 99% at 307, longest 603. Other
# tokenizers make some percent more or fewer of the same text.
# fmt: off
ALPACA_HISTOGRAM = (
    0, 0, 0, 1, 27, 69, 110, 144, 166, 108, 94, 80, 75, 77, 73, 59, 57, 76, 44, 29, 39, 21, 22, 24, 15, 8, 13, 7, 6,
    5, 7, 4, 5, 5, 4, 7, 2, 0, 4, 3, 0, 1, 2, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
    0, 0, 0, 0, 0, 0, 0, 0, 1,
)
# fmt: on


def alpaca_lengths() -> Lengths:
    """Alpaca's 52,002 rows, spread over the middles of the histogram's bins in its proportions."""
    import numpy as np

    counts = np.array(ALPACA_HISTOGRAM)
    ends = np.round(np.cumsum(counts) / counts.sum() * ALPACA_ROWS).astype(int)
    tokens = np.repeat(8 * np.arange(len(counts)) + 5, np.diff(ends, prepend=0))
    return Lengths(DEFAULT_TRAINING_DATASET, tokens, ALPACA_RESPONSE_SHARE)


def lengths_of(source: str, tokens: Sequence[int], response_starts: Sequence[int]) -> Lengths:
    """The lengths of tokenised rows, from the tokens of each and the place where its response starts."""
    import numpy as np

    counts = np.array(tokens, dtype=np.int64)
    total = max(int(counts.sum()), 1)
    return Lengths(source, counts, (total - sum(response_starts)) / total)


@dataclass(frozen=True)
class Load:
    """The work of an epoch for the devices. The slowest device of each micro-step sets the pace.

    Attributes:
        steps: optimizer steps of an epoch; each has `accumulation` micro-steps.
        real_tokens, computed_tokens: of an epoch, over all devices.
        paced_tokens: what all devices could compute in the time that the slowest of each micro-step takes.
        slowest_tokens: mean over micro-steps of the tokens computed by the slowest device.
        slowest_scores: the same of its attention scores, one head's: the sum of row length^2, half if causal.
        peak_tokens: the most tokens a device ever computes at once.
        peak_row: the longest row, padded where rows are.
    """

    steps: int
    real_tokens: int
    computed_tokens: int
    paced_tokens: int
    slowest_tokens: float
    slowest_scores: float
    peak_tokens: int
    peak_row: int


def epoch_load(lengths: Lengths, settings: Settings, seed: int = 0) -> Load:
    """Counts the work of one epoch in random order.

    Padded: a device pads its rows to the longest, rounded up to 8 (data/collator.py). Packed: a global batch is dealt
    in shares of equal token count, the largest 0.5% above the mean (data/batching.py), or the batch's longest row.
    The plan assumes that the model packs; the trainer proves it, and otherwise pads rows of like length.
    """
    import numpy as np

    ranks, rows = settings.ranks, settings.rows
    held_out = min(settings.options.test_size, len(lengths.tokens) // 2)
    tokens = np.random.default_rng(seed).permutation(lengths.tokens)[held_out:]
    batch = settings.global_batch
    # Whole batches only: the last, smaller one of an epoch matters little.
    whole = np.resize(tokens, max(1, len(tokens) // batch) * batch)
    longest = int(tokens.max())
    if settings.packed:
        batches = whole.reshape(-1, batch)
        shares = ranks * settings.accumulation
        largest = np.maximum(LARGEST_SHARE * batches.sum(axis=1) / shares, batches.max(axis=1))
        slowest = float(largest.mean())
        scores = slowest * float((whole.astype(float) ** 2).sum() / whole.sum()) / 2
        peak, peak_row, computed = math.ceil(largest.max()), longest, int(tokens.sum())
    else:
        padded = padded_length(whole.reshape(-1, ranks, rows).max(axis=2))  # (micro-steps, ranks)
        slow = padded.max(axis=1)
        slowest, scores = float(rows * slow.mean()), float(rows * (slow.astype(float) ** 2).mean())
        peak_row = int(padded_length(longest))
        peak, computed = rows * peak_row, int(rows * padded.sum() * len(tokens) / len(whole))
    return Load(
        steps=math.ceil(len(tokens) / batch),
        real_tokens=int(tokens.sum()),
        computed_tokens=computed,
        paced_tokens=int(slowest * len(tokens) / rows),
        slowest_tokens=slowest,
        slowest_scores=scores,
        peak_tokens=peak,
        peak_row=peak_row,
    )


def padded_length(length: Any) -> Any:
    """The next multiple of 8 of a length, or of each in an array: what a padded batch of it has."""
    return -(-length // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
