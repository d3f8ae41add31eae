"""Figures of completions, of differences, and what they are given of."""

from __future__ import annotations

import random

import pytest

from rosd_fast.evaluation.records import Scope
from rosd_fast.evaluation.result import difference, figures, scopes, vote, within
from tests.evaluation.completions import make

COMPLETIONS = [
    *make("a", "4", "4", "-5", ""),
    *make("b", "-1", "-1", "2", "-3"),
    *make("c", "7", "7", "7", "7", domain="dates", num_tokens=8),
]


def test_figures_of_completions() -> None:
    found = figures(random.Random(0).sample(COMPLETIONS, len(COMPLETIONS)))
    assert (found.num_problems, found.samples) == (3, 4)
    assert found.accuracy.value == pytest.approx((2 + 1 + 4) / 12)
    assert found.pass_at[1] == found.accuracy
    # One of two: 1 - C(2, 2) / C(4, 2), 1 - C(3, 2) / C(4, 2), 1.
    assert found.pass_at[2].value == pytest.approx((5 / 6 + 1 / 2 + 1) / 3)
    assert found.pass_at[4].value == 1.0
    assert found.majority.value == pytest.approx(2 / 3)
    assert found.answered_frac.value == pytest.approx(11 / 12)
    assert found.truncated_frac.value == pytest.approx(1 / 12)
    assert found.tokens_mean.value == pytest.approx((4 + 4 + 8) / 3)
    assert found.tokens_mean.low <= found.tokens_mean.value <= found.tokens_mean.high <= 8
    for estimate in (found.accuracy, found.majority, found.truncated_frac, *found.pass_at.values()):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_shaped_scores_have_a_mean_of_their_own() -> None:
    found = figures([*make("a", "4", score=0.5, success=False), *make("b", "4")])
    assert found.score.value == 0.75 and found.accuracy.value == 0.5


def test_equal_answers_are_one_vote() -> None:
    assert figures(make("a", "1234", "$1,234", "-7", "-7", "-8")).majority.value == 0.5
    assert figures(make("a", "1234", "$1,234.0", "1234", "-7", "-7")).majority.value == 1.0


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("0.5", "1/2", True),
        (" Paris. ", "paris", True),
        ("ﬁve", "FIVE", True),
        ('{"a": 1, "b": 2}', '{"b": 2,"a": 1}', True),
        ("[1, 2]", "[2, 1]", False),
        ("[broken", "[broken", True),
        ("yes", "no", False),
        ("12", "1.2", False),
    ],
)
def test_a_vote_is_the_answer_without_its_spelling(one: str, other: str, equal: bool) -> None:
    assert (vote(one) == vote(other)) is equal


def test_a_difference_is_over_the_problems_that_both_have() -> None:
    old = [*make("a", "-1", "-1"), *make("b", "2", "2"), *make("only old", "1", "1")]
    new = [*make("a", "4", "-1"), *make("b", "2", "2"), *make("only new", "1", "1")]
    found = difference(new, old)
    assert found is not None
    assert (found.num_problems, found.before, found.after) == (2, 0.5, 0.75)
    assert found.accuracy.value == 0.25
    assert found.pass_at[2].value == 0.5
    assert found.accuracy.low < 0.25 < found.accuracy.high
    assert difference(make("a", "4"), make("b", "4")) is None


def test_models_with_different_numbers_of_samples_can_be_compared() -> None:
    found = difference(make("a", "4", "4", "-1", "-1"), make("a", "4", "-1"))
    assert found is not None and found.accuracy.value == 0.0
    assert list(found.pass_at) == [1, 2]


def test_scopes_are_data_sets_their_domains_and_all() -> None:
    two = [*COMPLETIONS, *make("a", "1", "1", "1", "1", split="other")]
    assert scopes(two) == [
        Scope(split="test"),
        Scope(split="test", domain="dates"),
        Scope(split="test", domain="sums"),
        Scope(split="other"),
        Scope(),
    ]
    assert len(within(two, Scope(split="test", domain="sums"))) == 8
    assert len(within(two, Scope(split="other"))) == 4
    assert within(two, Scope()) == two
    assert scopes(make("a", "4")) == [Scope(split="test")]


def test_a_problem_without_all_of_its_completions_is_refused() -> None:
    for broken in ([], [*make("a", "4"), *make("b", "4", "4")]):
        with pytest.raises(ValueError, match="figures need one number"):
            figures(broken)
