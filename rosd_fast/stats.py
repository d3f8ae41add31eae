"""Figures of an evaluation, and how far to trust them.

All functions take arrays over problems. An evaluation draws its problems, and then k completions of
each: completions of one problem resemble each other, so intervals are over problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054  # of the normal distribution, for 95%


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def pass_at(successes: ArrayLike, samples: ArrayLike, draws: int) -> NDArray[np.float64]:
    """The probability that at least one of `draws` completions of a problem is right. [n]

    The estimator is unbiased: of the `samples` completions of a problem, `successes` are right, and
    1 - C(samples - successes, draws) / C(samples, draws) is the share of all choices of `draws` of
    them that have a right one (Chen et al., 2021, https://arxiv.org/abs/2107.03374). It is computed
    as a product, in which no factor overflows.

    Raises ValueError if `draws` is below 1 or above the number of samples of a problem.
    """
    right, total = np.asarray(successes, np.float64), np.asarray(samples, np.float64)
    if draws < 1 or draws > total.min(initial=np.inf):
        raise ValueError(f"pass@{draws} needs 1 to {total.min(initial=0):g} samples")
    miss = np.ones(np.broadcast_shapes(right.shape, total.shape))
    for i in range(draws):
        miss *= np.maximum(total - right - i, 0) / (total - i)
    return 1 - miss


def majority(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """The probability that the most frequent answer of a problem is right. In [0, 1].

    answers: of each completion, None where it has none, which is no vote. right: whether each
    completion is right. Answers that are equally frequent are drawn with equal probability. An
    answer that was judged differently in several completions counts with the share of them that
    are right. Without an answer it is 0.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    hits = sum(ok for answer, ok in zip(answers, right, strict=True) if answer in winners)
    return hits / (most * len(winners))


def estimate_mean(values: ArrayLike) -> Estimate:
    """The mean of values in [0, 1] of n problems, with its interval. [n]"""
    values = np.asarray(values, np.float64)
    low, high = mean_interval(values[None])
    return Estimate(value=float(values.mean()), low=float(low[0]), high=float(high[0]))


def mean_interval(values: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """(lower, upper) limits of the means of rows. values: [rows, n], in [0, 1]."""
    n = values.shape[-1]
    mean = values.mean(-1)
    ratio = 1.0
    t = Z * Z * ratio / n
    centre = (mean + t / 2) / (1 + t)
    half = np.sqrt(t * mean * (1 - mean) + t * t / 4) / (1 + t)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)
