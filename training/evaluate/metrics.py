"""The metrics of answers and losses: of each row, and of all rows from the sums of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from training.errors import install_extra


@dataclass(frozen=True)
class Scores:
    """What a model did on each row. Arrays are `(rows,)` float64, except `answers`.

    Attributes:
        losses: sums of the losses of the response tokens, in nats.
        tokens: numbers of response tokens, with the end key.
        exact: 1 for an answer that is the expected one, without white space at its ends; else 0.
        rouge: ROUGE-L, 0 to 1.
        stopped: 1 for an answer that ended by itself, 0 for one that was cut at the limit.
        lengths: tokens of the answers, without the token that ended them.
        answers: the answers as text.
    """

    losses: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    rouge: np.ndarray
    stopped: np.ndarray
    lengths: np.ndarray
    answers: list[str]


@dataclass(frozen=True)
class Metric:
    """A figure of all rows: a ratio of sums over the rows, turned into the figure that is shown.

    Attributes:
        name: of the figure in JSON and MLflow.
        label: its words in tables.
        above, below: the parts of the ratio, from the scores; `below` None stands for the number of rows.
        shown: the figure from the ratio.
        percent: whether tables show it as a percentage.
        needs_same_tokens: whether two models can be compared only if they have the same tokens.
    """

    name: str
    label: str
    above: str
    below: str | None = None
    shown: Callable[[Any], Any] = lambda ratio: ratio
    percent: bool = False
    needs_same_tokens: bool = False


METRICS = (
    Metric("loss", "loss, nats a token", "losses", "tokens", needs_same_tokens=True),
    Metric("perplexity", "perplexity", "losses", "tokens", np.exp, needs_same_tokens=True),
    Metric("exact_match", "exact match", "exact", percent=True),
    Metric("rouge_l", "ROUGE-L", "rouge", percent=True),
    Metric("stops", "stops by itself", "stopped", percent=True),
    Metric("length", "length, tokens", "lengths", needs_same_tokens=True),
)


def exact_matches(expected: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1.0 for each answer that equals the expected one, without white space at both ends; else 0.0."""
    pairs = zip(expected, answers, strict=True)
    return np.array([float(text.strip() == answer.strip()) for text, answer in pairs])


def rouge_l(expected: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """ROUGE-L of each answer: the F-measure of the package rouge-score, on word stems as in its papers' figures.

    Its words are letters a to z and digits, so texts in other alphabets get 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(expected, answers, strict=True)
    return np.array([float(scorer.score(text, answer)["rougeL"].fmeasure) for text, answer in pairs])


def missing_extra(package: str) -> list[str]:
    """The problem that a package of the extra `evaluate` is not installed; [] if it is."""
    if find_spec(package) is not None:
        return []
    name = package.replace("_", "-")
    return [f"the package {name} is not installed. Type {install_extra('evaluate')}"]
