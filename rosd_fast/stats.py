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

Floats = NDArray[np.float64]

Z = 1.959963984540054  # of the normal distribution, for 95%
FULL_SKEW = 6.0  # squared skewness of a sample from which a rare value of any size is expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def pass_at(successes: ArrayLike, samples: ArrayLike, draws: int) -> Floats:
    """The probability that at least one of `draws` completions of a problem is right. [n]

    The estimator is unbiased: of the `samples` completions of a problem, `successes` are right, and
    1 - C(samples - successes, draws) / C(samples, draws) is the share of all choices of `draws` of
    them that have a right one (Chen et al., 2021, https://arxiv.org/abs/2107.03374). It is computed
    as a product, in which no factor overflows.

    Raises ValueError if `draws` is below 1 or above the number of samples of a problem.
    """
    right, total = np.asarray(successes, np.float64), np.asarray(samples, np.float64)
    fewest = total.min(initial=np.inf)
    if not 1 <= draws <= fewest:
        raise ValueError(f"pass@{draws} of {fewest:g} samples: must be 1 to {fewest:g}")
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


def estimate_mean(values: ArrayLike, *, samples: int = 1) -> Estimate:
    """The mean of the values of n problems, with its interval over problems.

    values: [n], in [0, 1]. samples: the number of completions that each value was made from.
    Raises ValueError without a value, and for one outside of [0, 1].
    """
    values = _checked(values)
    low, high = mean_interval(values, samples=samples)
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))


def estimate_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """The mean of `second - first` of n problems, with its interval over problems.

    The values of a problem are a pair, so what makes a problem hard for both cancels out.

    first, second: [n], in [0, 1]. Raises ValueError without a value, for one outside of [0, 1] and
    for different numbers of them.
    """
    first, second = _checked(first), _checked(second)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} values cannot be paired with {len(second)}")
    differences = second - first
    low, high = difference_interval(differences)
    return Estimate(value=float(differences.mean()), low=float(low), high=float(high))


def mean_interval(values: Floats, *, samples: int = 1) -> tuple[Floats, Floats]:
    """(lower, upper) limits of the 95% intervals of means. values: [..., n], in [0, 1].

    It is Wilson's score interval (1927, https://doi.org/10.1080/01621459.1927.10502953) with a
    design effect, as for proportions of clustered samples (Korn and Graubard, 1998, Survey
    Methodology 24). A value in [0, 1] with mean m has at most the variance m (1 - m) of a yes or
    no; here it has the share `ratio` of it, which is estimated. The limits are the means m for
    which the sample's mean is 1.96 standard errors sqrt(ratio m (1 - m) / n) away. So they stay in
    [0, 1] and are asymmetric near its ends, where Student's t and the bootstrap cover far too
    little. For values that are 0 or 1 it is Wilson's interval itself.

    The variance of few values is mostly too small, as rare ones are missing: `_with_unseen` adds
    some. When all values are equal but neither 0 nor 1, the ratio is that of `samples` draws; a
    single value says nothing of other problems, and has the ratio 1.

    Coverage by simulation: docs/evaluation.md.
    """
    n = values.shape[-1]
    mean = values.mean(-1)
    most = mean * (1 - mean)
    spread = values - mean[..., None]
    total, unseen, skew = _with_unseen(spread, spread, most)
    weight = 1 + skew / 2
    variance = (total + weight * unseen) / (n - 1 + weight)
    ratio = np.divide(variance, most, out=np.ones_like(most), where=most > 0)
    ratio = np.where((total > 0) | (most == 0), np.minimum(ratio, 1), 1 / samples if n > 1 else 1)
    t = Z * Z * ratio / n
    centre = (mean + t / 2) / (1 + t)
    half = np.sqrt(t * most + t * t / 4) / (1 + t)
    return np.clip(centre - half, 0, mean), np.clip(centre + half, mean, 1)


def difference_interval(differences: Floats) -> tuple[Floats, Floats]:
    """(lower, upper) limits of the 95% intervals of mean differences. [..., n], in [-1, 1].

    It is the normal interval after one pseudo-observation, half of it a gain and half of it a loss.
    For differences of -1, 0 and 1 that is the adjusted Wald interval of paired proportions (Bonett
    and Price, 2012, https://doi.org/10.3102/1076998611411915) with half of its adjustment. For
    others the gain has the size of the larger ones among them (`_with_unseen`), and 1 if all are 0.

    Coverage by simulation: docs/evaluation.md.
    """
    n = differences.shape[-1]
    spread = differences - differences.mean(-1, keepdims=True)
    total, unseen, _ = _with_unseen(differences, spread, np.ones(differences.shape[:-1]))
    centre = differences.sum(-1) / (n + 1)
    half = Z * np.sqrt(((total + unseen) / (n + 1) - centre**2) / (n + 1))
    return np.maximum(centre - half, -1), np.minimum(centre + half, 1)


def _with_unseen(values: Floats, spread: Floats, most: Floats) -> tuple[Floats, Floats, Floats]:
    """(sum of squares, square of a value that may be missing, squared skewness) of each row.

    The missing value is as large as the large ones of the sample are, whose squares are weighted by
    themselves. If the sample is skewed, a tail has begun to show, and the value is up to `most`.

    values: [..., n]. spread: their deviations from the mean. most: [...], the largest square.
    """
    squares, deviations = values * values, spread * spread
    total, fourth = squares.sum(-1), _dot(squares, squares)
    second, third = deviations.sum(-1), _dot(deviations, spread)
    tiny = 1e-12
    square = np.divide(fourth, total, out=np.array(most), where=total > tiny)
    skew = values.shape[-1] * np.divide(
        third**2, second**3, out=np.zeros_like(total), where=second > tiny
    )
    square = np.minimum(square, most)
    return (
        np.where(total > tiny, total, 0),
        square + (most - square) * np.minimum(skew / FULL_SKEW, 1),
        skew,
    )


def _dot(left: Floats, right: Floats) -> Floats:
    """The sum of products along the last axis."""
    return np.einsum("...i,...i->...", left, right)


def _checked(values: ArrayLike) -> Floats:
    """The values as an array. Raises ValueError for none, and for one outside of [0, 1]."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an estimate needs values of problems, not the shape {values.shape}")
    if not (values.min() >= -1e-12 and values.max() <= 1 + 1e-12):
        raise ValueError("a value is outside of [0, 1]")
    return values.clip(0, 1)
