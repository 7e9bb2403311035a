"""Compares the scores of two models on the same rows: each metric with its interval, and the paired difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from training.consts import DEFAULT_SEED
from training.evaluate.intervals import percentile_interval, resampled_sums
from training.evaluate.metrics import METRICS, Metric, Scores


def compare_scores(base: Scores, tuned: Scores, same_tokens: bool = True) -> dict[str, Any]:
    """Each metric by name: {"base": {"value", "low", "high"}, "tuned": ..., "difference": tuned minus base}.

    The difference is paired: base and tuned are resampled with the same rows. It is None for a metric that counts
    tokens, if the models do not have the `same_tokens`.
    """
    names = list(dict.fromkeys(name for metric in METRICS for name in (metric.above, metric.below) if name))
    columns = np.stack([getattr(scores, name) for scores in (base, tuned) for name in names], axis=1)
    rows, total, resampled = len(columns), columns.sum(axis=0), resampled_sums(columns, DEFAULT_SEED)

    def figure(metric: Metric, sums: np.ndarray) -> Any:
        """The metric of one model, from the sums of its columns `(..., names)`."""
        above = sums[..., names.index(metric.above)]
        below = sums[..., names.index(metric.below)] if metric.below else rows
        return metric.shown(above / below)

    of_base, of_tuned = slice(len(names)), slice(len(names), None)  # columns of each model
    results: dict[str, Any] = {}
    for metric in METRICS:
        base_value, tuned_value = figure(metric, total[of_base]), figure(metric, total[of_tuned])
        base_draws = figure(metric, resampled[:, of_base])
        tuned_draws = figure(metric, resampled[:, of_tuned])
        comparable = same_tokens or not metric.needs_same_tokens
        results[metric.name] = {
            "base": asdict(percentile_interval(base_value, base_draws)),
            "tuned": asdict(percentile_interval(tuned_value, tuned_draws)),
            "difference": asdict(percentile_interval(tuned_value - base_value, tuned_draws - base_draws))
            if comparable
            else None,
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
