"""Mini-batches and normalizers, for any samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.batch.weights import Normalize, mini_batches, normalized, with_problem_weights
from rosd_fast.types import Group, Problem, TrainSample

MAX_NEW_TOKENS = 12


@st.composite
def sample_lists(draw: Any, max_size: int = 20) -> list[TrainSample]:
    """Distilled samples, policy gradients and likelihoods of up to 8 problems, in any order."""
    samples = []
    for index in range(draw(st.integers(0, max_size))):
        length = draw(st.integers(1, MAX_NEW_TOKENS))
        start = draw(st.integers(0, length - 1))
        distilled = draw(st.booleans())
        advantage = None if distilled else draw(st.sampled_from([None, 0.0, 0.5, -1.5]))
        samples.append(
            TrainSample(
                rollout_id=f"r{index}",
                problem_id=f"p{draw(st.integers(0, 7))}",
                student_prompt_ids=(1,),
                teacher_prompt_ids=(2,) if distilled else None,
                completion_ids=(3,) * length,
                logprobs=(-1.0,) * length,
                start=start,
                end=draw(st.integers(start + 1, length)),
                advantage=advantage,
                weight=draw(st.sampled_from([1.0, 0.25, 2.0])),
            )
        )
    return samples


def problems(samples: Sequence[TrainSample]) -> list[str]:
    """The problems in the order of their first sample."""
    return list(dict.fromkeys(sample.problem_id for sample in samples))


@given(samples=sample_lists(), count=st.integers(1, 6))
def test_mini_batches_split_problems_evenly(samples: list[TrainSample], count: int) -> None:
    parts = mini_batches(samples, count)
    num_problems = [len(problems(part)) for part in parts]
    assert len(parts) == max(1, min(count, len(problems(samples))))
    assert max(num_problems) - min(num_problems) <= 1
    # Consecutive problems, none of them split, and their samples in the order that they had.
    assert [p for part in parts for p in problems(part)] == problems(samples)
    place = {sample.rollout_id: index for index, sample in enumerate(samples)}
    orders = [[place[sample.rollout_id] for sample in part] for part in parts]
    assert orders == [sorted(order) for order in orders]
    assert sorted(index for order in orders for index in order) == list(range(len(samples)))


NORMALIZERS: list[Normalize] = ["token", "sequence", "constant"]


@pytest.mark.parametrize("normalize", NORMALIZERS)
@given(samples=sample_lists(), entropy_bonus=st.booleans())
def test_normalized(normalize: Normalize, samples: list[TrainSample], entropy_bonus: bool) -> None:
    found = normalized(
        samples, normalize, max_new_tokens=MAX_NEW_TOKENS, entropy_bonus=entropy_bonus
    )
    # Distilled samples stay; of the others those that can have a gradient, in order.
    kept = [s for s in samples if s.is_distilled or entropy_bonus or s.advantage != 0]
    assert [s.rollout_id for s in found] == [s.rollout_id for s in kept]
    others = [s for s in samples if not s.is_distilled]
    for before, after in zip(kept, found, strict=True):
        if before.is_distilled:
            assert after == before
            continue
        share = {
            "token": 1 / sum(s.num_tokens for s in others),
            "sequence": 1 / before.num_tokens / len(others),
            "constant": 1 / MAX_NEW_TOKENS / len(others),
        }[normalize]
        assert after.weight == pytest.approx(before.weight * share, rel=1e-12)


@pytest.mark.parametrize("normalize", NORMALIZERS)
@given(samples=sample_lists())
def test_weights_of_a_mean_add_up_to_one(normalize: Normalize, samples: list[TrainSample]) -> None:
    """The sum over tokens is a mean over all of them or over rollouts; constant divides by more."""
    found = normalized(samples, normalize, max_new_tokens=MAX_NEW_TOKENS, entropy_bonus=True)
    weights = {s.rollout_id: s.weight for s in samples}
    total = sum(
        s.weight * s.num_tokens / weights[s.rollout_id] for s in found if not s.is_distilled
    )
    if all(s.is_distilled for s in samples):
        assert total == 0
    elif normalize == "constant":
        assert 0 < total <= 1 + 1e-12
    else:
        assert total == pytest.approx(1)


@given(samples=sample_lists(), count=st.integers(1, 4))
def test_each_mini_batch_has_its_own_normalizer(samples: list[TrainSample], count: int) -> None:
    for part in mini_batches(samples, count):
        found = normalized(part, "token", max_new_tokens=MAX_NEW_TOKENS)
        others = [s for s in part if not s.is_distilled]
        for sample in (s for s in found if not s.is_distilled):
            own = next(s for s in others if s.rollout_id == sample.rollout_id)
            num_tokens = sum(s.num_tokens for s in others)
            assert sample.weight * num_tokens == pytest.approx(own.weight)


@given(samples=sample_lists(), weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=8))
def test_the_weight_of_a_problem_multiplies_that_of_its_samples(
    samples: list[TrainSample], weights: list[float]
) -> None:
    groups = [
        Group(
            problem=Problem(
                id=f"p{i}", domain="d", prompt="?", answer="4", verifier="number", weight=weights[i]
            ),
            rollouts=(),
        )
        for i in range(8)
    ]
    weighted = with_problem_weights(samples, groups)
    for sample, other in zip(samples, weighted, strict=True):
        assert other.weight == sample.weight * weights[int(sample.problem_id[1:])]
        assert other.rollout_id == sample.rollout_id
        assert other.has_effect == (sample.has_effect and other.weight > 0)
