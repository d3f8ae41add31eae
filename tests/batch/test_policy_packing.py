"""Packing of samples with several losses: a rollout goes through the student once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.batch.packing import pack
from rosd_fast.types import PackedBatch, TrainSample


def rollout(group: int, index: int, length: int = 20) -> TrainSample:
    """A distilled sample of the second half of a rollout."""
    return TrainSample(
        rollout_id=f"{group}/{index}",
        problem_id=str(group),
        student_prompt_ids=(group, *range(20)),
        teacher_prompt_ids=(group, *range(30), 60 + index),
        completion_ids=(80 + index, *range(1, length)),
        logprobs=tuple(-place / 8 for place in range(length)),
        start=length // 2,
        end=length,
        weight=0.5,
    )


def reinforced(sample: TrainSample, advantage: float | None = -1.5) -> TrainSample:
    """The sample of the same rollout by policy gradient, or by likelihood, on all its tokens."""
    return replace(sample, teacher_prompt_ids=None, advantage=advantage, start=0, weight=0.25)


@pytest.mark.parametrize("min_shared", [1, 16])
def test_a_rollout_with_two_losses_goes_through_the_student_once(min_shared: int) -> None:
    one = rollout(50, 0)
    (alone,) = pack([one], max_tokens=1000, min_shared=min_shared)
    (both,) = pack([one, reinforced(one)], max_tokens=1000, min_shared=min_shared)
    assert both.student.cu_seqlens[-1] == alone.student.cu_seqlens[-1] == 21 + 19
    assert both.num_tokens == alone.num_tokens
    assert both.rollout_ids == ("50/0", "50/0")
    assert both.policy is not None and both.policy.gather.tolist() == [*range(20, 40)]
    # The last ten of these rows are also those of the distilled tokens.
    assert both.student.gather.tolist() == [*range(30, 40)]
    assert torch.equal(both.student.gather, alone.student.gather)
    (apart,) = pack([one, reinforced(one)], max_tokens=1000, min_shared=0)
    assert apart.student.cu_seqlens[-1] == 2 * 40


def test_the_rows_of_policy_tokens() -> None:
    one, other = rollout(50, 0), rollout(50, 1)
    samples = [one, reinforced(one), reinforced(other, None)]
    (batch,) = pack(samples, max_tokens=1000)
    tokens = batch.policy
    assert tokens is not None and batch.num_policy == 40 and batch.num_distilled == 10
    assert tokens.token_ids.tolist() == [*one.completion_ids, *other.completion_ids]
    assert tokens.advantages.tolist() == [-1.5] * 20 + [0.0] * 20
    assert tokens.is_likelihood.tolist() == [False] * 20 + [True] * 20
    assert tokens.weights.tolist() == [0.25] * 40
    assert tokens.rollout_logprobs.tolist() == [*one.logprobs, *other.logprobs]
    assert tokens.sample_index.tolist() == [1] * 20 + [2] * 20
    assert batch.sample_index.tolist() == [0] * 10


def test_all_micro_batches_of_a_step_have_the_same_losses() -> None:
    """Also those without a token of a kind, and the empty one of a rank without samples."""
    one, other = rollout(50, 0), rollout(51, 0)
    batches = pack([one, reinforced(other)], max_tokens=1, num_ranks=3)
    assert [len(batch.rollout_ids) for batch in batches] == [1, 1, 0]
    assert all(b.teacher is not None and b.policy is not None for b in batches)
    assert sorted((b.num_distilled, b.num_policy) for b in batches) == [(0, 0), (0, 20), (10, 0)]
    for batch in pack([one], max_tokens=1, num_ranks=2):
        assert batch.policy is None and batch.teacher is not None
    for batch in pack([reinforced(one)], max_tokens=1, num_ranks=2):
        assert batch.teacher is None and batch.policy is not None
        assert batch.num_tokens == batch.student.cu_seqlens[-1]


@st.composite
def blends(draw: Any) -> list[TrainSample]:
    """Rollouts of two groups, each with one or two losses."""
    samples: list[TrainSample] = []
    for index in range(draw(st.integers(0, 8))):
        one = rollout(50 + index % 2, index, draw(st.integers(2, 9)))
        kind = draw(st.sampled_from(["divergence", "policy", "both", "likelihood"]))
        if kind in ("divergence", "both"):
            samples.append(one)
        if kind != "divergence":
            samples.append(reinforced(one, None if kind == "likelihood" else 0.5))
    return draw(st.permutations(samples))


def seen(batch: PackedBatch) -> list[tuple[str, str, int, tuple[int, ...], float]]:
    """(rollout, loss, token, everything before it, weight) of each trained token."""
    rows = [
        ("divergence", batch.student.gather, batch.token_ids, batch.sample_index, batch.weights)
    ]
    if (p := batch.policy) is not None:
        rows.append(("policy", p.gather, p.token_ids, p.sample_index, p.weights))
    return [
        (
            batch.rollout_ids[int(sample)],
            name,
            int(token),
            tuple(batch.student.sequence(int(row))),
            float(weight),
        )
        for name, gather, tokens, samples, weights in rows
        for row, token, sample, weight in zip(gather, tokens, samples, weights, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    samples=blends(),
    max_tokens=st.integers(1, 200),
    min_shared=st.integers(0, 4),
    num_ranks=st.integers(1, 3),
)
def test_each_trained_token_once_from_the_row_before_it(
    samples: list[TrainSample], max_tokens: int, min_shared: int, num_ranks: int
) -> None:
    batches = pack(samples, max_tokens=max_tokens, min_shared=min_shared, num_ranks=num_ranks)
    found = [token for batch in batches for token in seen(batch)]
    expected = [
        (
            s.rollout_id,
            "divergence" if s.is_distilled else "policy",
            s.completion_ids[place],
            (*s.student_prompt_ids, *s.completion_ids[:place]),
            s.weight,
        )
        for s in samples
        for place in range(s.start, s.end)
    ]
    assert sorted(found) == sorted(expected)
    assert len(batches) % num_ranks == 0
