"""Compares the scores of two models on the same rows: each metric with its interval, and the paired difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from training.consts import DEFAULT_SEED
from training.evaluate.intervals import Interval, percentile_interval, resampled_sums
from training.evaluate.metrics import METRICS, Metric, Scores


def compare_scores(
    base: Scores, tuned: Scores, same_tokens: bool = True, seed: int = DEFAULT_SEED
) -> dict[str, Any]:
    """Each metric by name: {"base": {"value", "low", "high"}, "tuned": ..., "difference": tuned minus base}.

    The difference is paired: base and tuned are resampled with the same rows. It is None for a metric that counts
    tokens, if the models do not have the `same_tokens`.
    """
    parts = [name for metric in METRICS for name in (metric.above, metric.below) if name]
    names = list(dict.fromkeys(parts))
    columns = np.stack([getattr(scores, name) for scores in (base, tuned) for name in names], axis=1)
    resampled = resampled_sums(columns, seed)
    rows, n = len(columns), len(names)

    def figure(metric: Metric, sums: np.ndarray, model: int) -> Any:
        """The metric of model 0 (base) or 1 (tuned), from sums `(..., columns)`."""
        above = sums[..., n * model + names.index(metric.above)]
        below = sums[..., n * model + names.index(metric.below)] if metric.below else rows
        return metric.shown(above / below)

    results: dict[str, Any] = {}
    for metric in METRICS:
        values = [figure(metric, columns.sum(axis=0), model) for model in (0, 1)]
        others = [figure(metric, resampled, model) for model in (0, 1)]
        intervals: list[Interval | None] = [
            percentile_interval(value, other) for value, other in zip(values, others, strict=True)
        ]
        comparable = same_tokens or not metric.needs_same_tokens
        difference = percentile_interval(values[1] - values[0], others[1] - others[0]) if comparable else None
        results[metric.name] = {
            name: None if interval is None else asdict(interval)
            for name, interval in zip(("base", "tuned", "difference"), [*intervals, difference], strict=True)
        }
    return results


def compare_groups(
    base: Scores, tuned: Scores, groups: Sequence[str], same_tokens: bool = True
) -> dict[str, Any]:
    """`compare_scores` of each group, {group: {"rows": number, "metrics": ...}}, the largest group first.

    `groups` has the category or the source of each row.
    """
    numbers: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        numbers.setdefault(group, []).append(number)
    return {
        group: {
            "rows": len(rows),
            "metrics": compare_scores(rows_of(base, rows), rows_of(tuned, rows), same_tokens),
        }
        for group, rows in sorted(numbers.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def rows_of(scores: Scores, rows: Sequence[int]) -> Scores:
    """The scores of some rows."""
    parts = {name: getattr(scores, name) for name in Scores.__dataclass_fields__ if name != "answers"}
    chosen = {name: values[list(rows)] for name, values in parts.items()}
    return Scores(**chosen, answers=[scores.answers[row] for row in rows])
