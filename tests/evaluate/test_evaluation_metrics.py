"""The metrics on literal values, and the coverage of their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.evaluate.compare import compare_groups, compare_scores
from training.evaluate.intervals import percentile_interval, resampled_sums
from training.evaluate.metrics import Scores, exact_matches, rouge_l


def scores(losses: list[float], tokens: list[float], **other: list[float]) -> Scores:
    ones = [1.0] * len(losses)
    columns = {name: other.get(name, ones) for name in ("exact", "rouge", "stopped", "lengths")}
    arrays = {name: np.array(values, float) for name, values in columns.items()}
    return Scores(np.array(losses, float), np.array(tokens, float), **arrays, answers=[""] * len(losses))


def test_the_loss_is_that_of_a_token_and_perplexity_its_exponential() -> None:
    base = scores([2.0, 6.0], [1, 3], exact=[0, 0], rouge=[0.1, 0.3], stopped=[0, 1], lengths=[10, 20])
    tuned = scores([1.0, 1.0], [1, 3], exact=[1, 0], rouge=[1.0, 0.5], stopped=[1, 1], lengths=[4, 5])
    found = compare_scores(base, tuned)
    values = {
        name: tuple(figures[key]["value"] for key in ("base", "tuned", "difference"))
        for name, figures in found.items()
    }
    assert values == {
        "loss": (2.0, 0.5, -1.5),  # (2 + 6) / (1 + 3), not the mean of 2 and 2
        "perplexity": pytest.approx((math.exp(2), math.exp(0.5), math.exp(0.5) - math.exp(2))),
        "exact_match": (0.0, 0.5, 0.5),
        "rouge_l": pytest.approx((0.2, 0.75, 0.55)),
        "stops": (0.5, 1.0, 0.5),
        "length": (15.0, 4.5, -10.5),
    }  # fmt: skip
    for figures in found.values():
        for interval in figures.values():
            assert interval["low"] <= interval["value"] <= interval["high"]


def test_models_with_other_tokens_are_not_compared_by_what_counts_tokens() -> None:
    found = compare_scores(scores([2.0], [1]), scores([3.0], [2]), same_tokens=False)
    missing = {name for name, figures in found.items() if figures["difference"] is None}
    assert missing == {"loss", "perplexity", "length"}
    assert found["loss"]["tuned"]["value"] == 1.5


def test_an_answer_matches_without_the_white_space_at_its_ends() -> None:
    found = exact_matches(["Paris\n", "Paris", "two  words", ""], [" Paris", "paris", "two words", " "])
    assert found.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_of_stems() -> None:
    expected = ["the cat sat on the mat", "running dogs", "a b c", "Größe"]
    answers = ["the cat the mat", "dog runs", "", "Größe"]
    # 4 words in common: precision 4/4, recall 4/6. "dog" alone: precision 1/2, recall 1/2.
    assert rouge_l(expected, answers).tolist() == pytest.approx([0.8, 0.5, 0.0, 1.0])


def test_the_difference_is_paired() -> None:
    """Rows differ a lot, but every row gains the same: the difference is certain, the figures are not."""
    losses = np.random.default_rng(0).uniform(1, 9, 50)
    found = compare_scores(scores(list(losses), [1.0] * 50), scores(list(losses - 0.5), [1.0] * 50))["loss"]
    assert found["base"]["high"] - found["base"]["low"] > 0.5
    assert found["difference"] == pytest.approx({"value": -0.5, "low": -0.5, "high": -0.5})


def test_each_category_has_its_own_figures_the_largest_first() -> None:
    base = scores([1.0, 2.0, 3.0], [1, 1, 1])
    found = compare_groups(base, scores([1.0, 1.0, 1.0], [1, 1, 1]), ["qa", "chat", "qa"])
    assert {name: part["rows"] for name, part in found.items()} == {"qa": 2, "chat": 1}
    assert list(found) == ["qa", "chat"]
    assert found["qa"]["metrics"]["loss"]["difference"]["value"] == -1.0


@pytest.mark.parametrize("kind", ["mean", "share", "ratio"])
def test_intervals_cover_the_true_value_in_about_95_of_100_samples(kind: str) -> None:
    draws = np.random.default_rng(7)
    samples, rows = 400, 150
    covered = 0
    for seed in range(samples):
        tokens = draws.integers(1, 40, rows)
        if kind == "ratio":  # the loss of a token in rows of different lengths; the true value is 2
            columns = np.stack([draws.exponential(2.0, rows) * tokens, tokens], axis=1)
        else:
            values = draws.exponential(2.0, rows) if kind == "mean" else draws.random(rows) < 0.3
            columns = np.stack([values, np.ones(rows)], axis=1).astype(float)
        sums = resampled_sums(columns, seed, resamples=600)
        interval = percentile_interval(*(part[..., 0] / part[..., 1] for part in (columns.sum(axis=0), sums)))
        covered += interval.low <= (0.3 if kind == "share" else 2.0) <= interval.high
    # 95% less what a percentile interval of 150 rows of a skewed figure lacks; 3 standard errors of 400 are 3.3%
    assert 0.91 <= covered / samples <= 0.98


def test_intervals_are_the_same_in_every_run_and_of_any_size() -> None:
    columns = np.random.default_rng(1).random((3000, 2))
    first, second = (resampled_sums(columns, 5, 2000) for _ in range(2))
    assert (first == second).all()
    assert first.shape == (2000, 2)
    assert np.abs(first[:, 0].mean() - columns[:, 0].sum()) < 3
    assert np.std(first[:, 0]) == pytest.approx(math.sqrt(3000 * columns[:, 0].var()), rel=0.1)
