"""Row lengths of a dataset, and the tokens that the devices compute in one epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.consts import DEFAULT_TRAINING_DATASET, LARGEST_SHARE, PAD_TO_MULTIPLE_OF
from training.data.held_out import default_size
from training.data.source_names import joined

if TYPE_CHECKING:
    import numpy as np

    from training.options.settings import Settings


@dataclass(frozen=True)
class Lengths:
    """Row lengths of a dataset: `tokens (rows,) int64`, and the share of all tokens that belong to responses."""

    source: str
    tokens: np.ndarray
    response_share: float


ALPACA_ROWS = 52_002
ALPACA_RESPONSE_SHARE = 0.569

# Number of rows with 1-8, 9-16, ... tokens among 1,500 random rows of Alpaca, tokenised by training.data with GPT-2's
# BPE (each control token is one token): mean 106.7, median 91, 99th percentile 307, longest 603. Other tokenizers
# produce a few percent more or fewer tokens.
# fmt: off
ALPACA_HISTOGRAM = (
    0, 0, 0, 1, 27, 69, 110, 144, 166, 108, 94, 80, 75, 77, 73, 59, 57, 76, 44, 29, 39, 21, 22, 24, 15, 8, 13, 7, 6,
    5, 7, 4, 5, 5, 4, 7, 2, 0, 4, 3, 0, 1, 2, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
    0, 0, 0, 0, 0, 0, 0, 0, 1,
)
# fmt: on


def alpaca_lengths() -> Lengths:
    """Alpaca's 52,002 rows in the proportions of the histogram, each at the middle of its bin."""
    import numpy as np

    counts = np.array(ALPACA_HISTOGRAM)
    ends = np.round(np.cumsum(counts) / counts.sum() * ALPACA_ROWS).astype(int)
    tokens = np.repeat(8 * np.arange(len(counts)) + 5, np.diff(ends, prepend=0))
    return Lengths(DEFAULT_TRAINING_DATASET, tokens, ALPACA_RESPONSE_SHARE)


def row_lengths(source: str, tokens: Sequence[int], response_tokens: int) -> Lengths:
    """Lengths from each tokenised row's token count and the number of tokens in all responses."""
    import numpy as np

    counts = np.array(tokens, dtype=np.int64)
    return Lengths(source, counts, response_tokens / max(int(counts.sum()), 1))


def joined_lengths(parts: Sequence[Lengths]) -> Lengths:
    """The rows of several sources together."""
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    totals = [int(part.tokens.sum()) for part in parts]
    responses = sum(part.response_share * total for part, total in zip(parts, totals, strict=True))
    return Lengths(
        joined([part.source for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        responses / max(sum(totals), 1),
    )


@dataclass(frozen=True)
class Load:
    """The computation of one epoch. In each micro-step all devices wait for the slowest one.

    Attributes:
        held_out: rows that are not trained on.
        steps: optimizer steps per epoch; each has `accumulation` micro-steps.
        real_tokens, computed_tokens: per epoch over all devices, without and with padding.
        paced_tokens: tokens that all devices could compute in the time of the slowest device of each micro-step.
        slowest_tokens: tokens computed by the slowest device, mean over micro-steps.
        slowest_scores: attention scores of one head on that device, mean: the sum of row length^2, half if causal.
        peak_tokens: the most tokens that a device computes at once.
        peak_row: the longest row, including padding if rows are padded.
    """

    held_out: int
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

    Padded: a device pads its rows to the longest one, rounded up to 8 (data/collator.py). With batching "length"
    a device's rows have similar lengths. Packed: a global batch is split into shares of equal token count; the largest
    share is 0.5% above the mean (data/batching.py), or the longest row.
    """
    import numpy as np

    ranks, rows = settings.ranks, settings.rows
    typed, count = settings.options.test_size, len(lengths.tokens)
    held_out = min(default_size(count) if typed is None else typed, count // 2)
    tokens = np.random.default_rng(seed).permutation(lengths.tokens)[held_out:]
    batch = settings.global_batch
    # Full batches only; the smaller last batch of an epoch is negligible.
    full_batches = np.resize(tokens, max(1, len(tokens) // batch) * batch)
    longest = int(tokens.max())
    if settings.packed:
        batches = full_batches.reshape(-1, batch)
        shares = ranks * settings.accumulation
        largest = np.maximum(LARGEST_SHARE * batches.sum(axis=1) / shares, batches.max(axis=1))
        slowest = float(largest.mean())
        scores = slowest * float((full_batches.astype(float) ** 2).sum() / full_batches.sum()) / 2
        peak, peak_row, computed = math.ceil(largest.max()), longest, int(tokens.sum())
    else:
        if settings.batching == "length":
            counts, longest_rows = _shares_by_length(full_batches, settings)
        else:
            counts, longest_rows = rows, full_batches.reshape(-1, ranks, rows).max(axis=2)
        padded = padded_length(longest_rows)  # (micro-steps, ranks), as `counts` is
        costs = counts * padded
        slowest, scores = float(costs.max(axis=1).mean()), float((costs * padded).max(axis=1).mean())
        peak_row = int(padded_length(longest))
        peak = rows * peak_row if settings.batching == "padded" else int(costs.max())
        computed = int(costs.sum() * len(tokens) / len(full_batches))
    return Load(
        held_out=held_out,
        steps=math.ceil(len(tokens) / batch),
        real_tokens=int(tokens.sum()),
        computed_tokens=computed,
        paced_tokens=int(slowest * len(tokens) / rows),
        slowest_tokens=slowest,
        slowest_scores=scores,
        peak_tokens=peak,
        peak_row=peak_row,
    )


def _shares_by_length(full_batches: Any, settings: Settings) -> tuple[Any, Any]:
    """(rows of each share, its longest row), both `(micro-steps, ranks) int64`, as the trainer deals them."""
    import numpy as np

    from training.data.batching import GlobalBatchSampler

    batch = settings.global_batch
    sampler = GlobalBatchSampler(
        full_batches.tolist(),
        batch,
        world_size=settings.ranks,
        rank=0,
        accumulation=settings.accumulation,
        seed=0,
        deal="length",
    )
    shares = [
        [(len(share), max(sampler.lengths[row] for row in share)) for share in micro_step]
        for start in range(0, len(full_batches), batch)
        for micro_step in sampler.micro_batches(list(range(start, start + batch)))
    ]
    counts, longest = np.moveaxis(np.array(shares), 2, 0)
    return counts, longest


def padded_length(length: Any) -> Any:
    """Rounds a length, or an array of lengths, up to a multiple of 8, as the padding collator does."""
    return -(-length // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
