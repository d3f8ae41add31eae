"""Advantages, for any scores, and the samples that they become."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import PolicyConfig
from rosd_fast.methods.targets import STD_EPS, advantages, policy_samples

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=16)
KINDS = ["group_std", "group_mean"]


@pytest.mark.parametrize("kind", KINDS)
@given(scores=SCORES)
def test_advantages(kind: str, scores: list[float]) -> None:
    found = advantages(scores, kind)
    mean = sum(scores) / len(scores)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    assert [math.copysign(1, a) for a in found if a] == [
        math.copysign(1, s - mean) for s, a in zip(scores, found, strict=True) if a
    ]
    # The order of the scores, and equal advantages for equal scores.
    for score, advantage in zip(scores, found, strict=True):
        for other, its in zip(scores, found, strict=True):
            assert (score > other) == (advantage > its)
    if len(set(scores)) <= 1:
        assert found == [0.0] * len(scores)


@given(scores=SCORES, shift=st.floats(-2, 2), scale=st.floats(0.1, 10))
def test_what_advantages_do_not_depend_on(scores: list[float], shift: float, scale: float) -> None:
    """A shift of all scores changes neither kind; a scale only the one without deviation."""
    moved = [scale * (score + shift) for score in scores]
    if len({round(score, 9) for score in moved}) != len(set(scores)):
        return
    flat = len(set(scores)) <= 1
    plain, scaled = advantages(scores, "group_mean"), advantages(moved, "group_mean")
    assert scaled == pytest.approx([0.0 if flat else scale * a for a in plain], abs=1e-9)
    plain, scaled = advantages(scores, "group_std"), advantages(moved, "group_std")
    if not flat:
        assert scaled == pytest.approx(plain, rel=1e-3, abs=1e-9)


@given(scores=SCORES.filter(lambda scores: len(set(scores)) > 1))
def test_normalized_advantages_have_unit_variance(scores: list[float]) -> None:
    """With G - 1 degrees of freedom, but for the 1e-6 beside the deviation."""
    found = advantages(scores, "group_std")
    deviation = math.sqrt(sum(a * a for a in found) / (len(found) - 1))
    assert deviation == pytest.approx(1, abs=20 * STD_EPS)


@pytest.mark.parametrize("mask", [False, True])
def test_truncated_rollouts_count_in_the_mean(make_group: Callable[..., Any], mask: bool) -> None:
    group, verdicts = make_group(["a b", "c", "d e f"], [1.0, 0.0, 0.0])
    cut = replace(group.rollouts[2], finish_reason="length")
    empty = replace(group.rollouts[1], completion_ids=(), logprobs=())
    group = replace(group, rollouts=(group.rollouts[0], empty, cut))
    config = PolicyConfig(mask_truncated=mask, advantage="group_mean")
    samples = policy_samples([group], verdicts, config, weight=0.5)
    assert [s.rollout_id for s in samples] == (["p0/0"] if mask else ["p0/0", "p0/2"])
    assert samples[0].advantage == pytest.approx(2 / 3) and samples[0].weight == 0.5
    assert (samples[0].start, samples[0].end) == (0, len(group.rollouts[0].completion_ids))
