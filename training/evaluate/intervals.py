"""Bootstrap intervals: how far a figure would move if other rows had been drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 4_000_000  # drawn rows that are held in memory at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def resampled_sums(columns: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Draws the rows again, with replacement, `resamples` times, and sums each column over the drawn rows.

    A row is drawn with all of its columns, so figures of two models are compared on the same rows. Every figure that is
    a ratio of sums (a mean, a share, the loss of a token) follows from the sums.

    Args:
        columns: `(rows, columns)` float64.

    Returns:
        `(resamples, columns)` float64.
    """
    rows = len(columns)
    draws = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // rows)
    sums = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = draws.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        sums.append(times @ columns)
    return np.concatenate(sums)


def percentile_interval(value: float, resampled: np.ndarray) -> Interval:
    """The interval between the 2.5th and the 97.5th percentile of a figure over the resamples `(resamples,)`.

    Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [outside, 100 - outside])
    return Interval(float(value), float(low), float(high))
