"""Estimators against their definitions, and intervals against a known truth, by simulation."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.coverage import Coverage, measure_differences, measure_means
from rosd_fast.stats import (
    estimate_difference,
    estimate_mean,
    majority,
    mean_interval,
    pass_at,
)

COVERED = (0.93, 0.97)
# (population, k, n) of the settings outside. With one sample per problem, or when nearly all fail
# or nearly all succeed, only few sums are likely, each inside of the interval or outside.
DISCRETE = {
    ("all near 0.5", 1, 10): 0.979,
    ("bell around 0.5", 1, 10): 0.976,
    ("U around 0.5", 1, 10): 0.978,
    ("U around 0.3", 1, 10): 0.923,
    ("U around 0.3", 1, 20): 0.972,
    ("U around 0.9", 1, 10): 0.929,
    ("U around 0.9", 1, 50): 0.971,
    ("U around 0.9", 4, 20): 0.970,
    ("most near 0, mean 0.1", 1, 10): 0.929,
    ("most near 0, mean 0.1", 1, 50): 0.971,
    ("most near 0, mean 0.1", 4, 20): 0.973,
    ("near 0, mean 0.05", 1, 10): 0.910,
    ("near 0, mean 0.05", 1, 20): 0.923,
    ("near 0, mean 0.05", 4, 10): 0.976,
    ("near 0, mean 0.05", 4, 20): 0.972,
    ("near 1, mean 0.95", 1, 10): 0.912,
    ("near 1, mean 0.95", 1, 20): 0.919,
    ("near 1, mean 0.95", 4, 10): 0.976,
    ("near 1, mean 0.95", 4, 20): 0.978,
    ("near 1, mean 0.95", 4, 50): 0.972,
    ("near 1, mean 0.95", 16, 10): 0.972,
}
# Few problems change, some of them much: such a change may not be in the sample at all.
RARE = {
    ("U around 0.5, a tenth of the problems redrawn", 1, 10): 0.972,
    ("U around 0.5, a tenth of the problems redrawn", 1, 20): 0.970,
    ("U around 0.5, a tenth of the problems redrawn", 4, 10): 0.971,
    ("U around 0.5, a tenth of the problems redrawn", 16, 10): 0.984,
    ("U around 0.5, a tenth of the problems redrawn", 16, 20): 0.983,
    ("U around 0.5, a tenth of the problems redrawn", 16, 50): 0.972,
    ("U around 0.5, a tenth of the problems solved", 1, 10): 0.972,
    ("U around 0.5, a tenth of the problems solved", 16, 10): 0.918,
    ("U around 0.5, a tenth of the problems solved", 16, 20): 0.908,
}

shares = st.integers(1, 16).flatmap(
    lambda k: st.lists(st.integers(0, k).map(lambda c: c / k), min_size=1, max_size=40)
)


def check(found: list[Coverage], named: dict[tuple[str, int, int], float]) -> None:
    """Every setting is covered, but those named, which have the coverage that the docs say."""
    low, high = COVERED
    outside = {
        (c.population, c.samples, c.problems): c.share for c in found if not low <= c.share <= high
    }
    assert outside == pytest.approx(named, abs=0.0006)


def test_intervals_of_a_mean_hold_the_truth() -> None:
    """10,000 draws per setting."""
    check(list(measure_means()), DISCRETE)


def test_intervals_of_a_difference_hold_the_truth() -> None:
    check(list(measure_differences()), RARE)


@pytest.mark.parametrize("problems", [10, 20, 50])
def test_one_sample_per_problem_is_covered_on_average(problems: int) -> None:
    """Coverage as a function of the truth jumps; its mean over all truths is what it should be."""
    rng = np.random.default_rng(problems)
    truth = rng.uniform(0.02, 0.98, 10_000)
    right = rng.binomial(1, truth[:, None], (10_000, problems))
    low, high = mean_interval(right.astype(float))
    share = ((low <= truth) & (truth <= high)).mean()
    assert 0.93 <= share <= 0.97


def test_students_interval_does_not() -> None:
    """What the simulation is able to find: mean and standard deviation alone cover too little."""
    rng = np.random.default_rng(0)
    values = rng.binomial(4, rng.beta(19, 1, (10_000, 20))) / 4
    half = 2.093 * values.std(-1, ddof=1) / np.sqrt(20)
    covered = np.abs(values.mean(-1) - 0.95) <= half
    assert covered.mean() < 0.91


@given(shares, st.integers(1, 16))
def test_an_interval_is_around_its_figure_and_never_a_point(
    values: list[float], samples: int
) -> None:
    found = estimate_mean(values, samples=samples)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.01
    mirrored = estimate_mean([1 - value for value in values], samples=samples)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)
    assert mirrored.high == pytest.approx(1 - found.low, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_a_difference_is_that_of_the_means_and_turns_with_its_models(
    pairs: list[tuple[float, float]],
) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found, turned = estimate_difference(first, second), estimate_difference(second, first)
    assert found.value == pytest.approx(np.mean(second) - np.mean(first), abs=1e-9)
    assert -1 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1
    assert found.low < found.high
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_equal_values_have_an_interval() -> None:
    assert estimate_mean([0.0] * 10).high == pytest.approx(0.2775, abs=1e-4)  # Wilson's
    assert estimate_mean([1.0] * 200).low == pytest.approx(0.9812, abs=1e-4)
    half = estimate_mean([0.5] * 10, samples=16)  # as 160 single draws have
    assert (half.low, half.high) == pytest.approx((0.4234, 0.5766), abs=1e-4)
    same = estimate_difference([0.25] * 50, [0.25] * 50)
    assert same.value == 0 and same.high == -same.low == pytest.approx(1.96 / 51, abs=1e-4)


@pytest.mark.parametrize("samples", [1, 4, 1000])
def test_one_problem_says_nothing_of_others(samples: int) -> None:
    found = estimate_mean([0.6], samples=samples)
    assert found.low < 0.15 and found.high > 0.9


def test_pairs_are_narrower_than_two_models_apart() -> None:
    rng = np.random.default_rng(1)
    hard = rng.beta(0.5, 0.5, 100)
    first, second = rng.binomial(16, hard) / 16, rng.binomial(16, hard) / 16
    paired = estimate_difference(first, second)
    apart = estimate_mean(first), estimate_mean(second)
    assert paired.high - paired.low < 0.5 * min(e.high - e.low for e in apart)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_is_the_share_of_choices_with_a_right_one(case: tuple[int, int]) -> None:
    total, right = case
    marks = [1] * right + [0] * (total - right)
    for draws in range(1, total + 1):
        choices = [max(choice) for choice in combinations(marks, draws)]
        expected = sum(choices) / len(choices)
        assert pass_at([right], total, draws)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_of_many_samples() -> None:
    assert pass_at([1], 100_000, 50_000)[0] == pytest.approx(0.5)
    assert pass_at([0, 5000], [10_000, 10_000], 100) == pytest.approx([0, 1], abs=1e-12)
    for draws in (0, 5):
        with pytest.raises(ValueError, match="must be 1 to 4"):
            pass_at([1], 4, draws)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["4", "5"], [True, False], 0.5),
        (["4", "5", "6", "4", "5", "6"], [True, False, False] * 2, 1 / 3),
        ([None, None, "4"], [False, False, True], 1.0),  # no answer is no vote
        ([None, None], [False, False], 0.0),
        (["a", "a", "b"], [True, False, False], 0.5),  # judged differently
    ],
)
def test_majority(answers: list[str | None], right: list[bool], expected: float) -> None:
    assert majority(answers, right) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12))
def test_a_tie_counts_each_winner_alike(answers: list[str | None]) -> None:
    votes = Counter(answer for answer in answers if answer is not None)
    winners = [a for a, count in votes.items() if count == max(votes.values())]
    right = [answer == "a" for answer in answers]
    expected = 1 / len(winners) if "a" in winners else 0.0
    assert majority(answers, right) == pytest.approx(expected)


def test_broken_contracts() -> None:
    for values in ([], [1.5], [-0.5], [float("nan")]):
        with pytest.raises(ValueError, match=r"outside|needs values"):
            estimate_mean(values)
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        estimate_difference([0, 1], [1])
