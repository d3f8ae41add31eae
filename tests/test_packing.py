"""Packing loses no distilled token, doubles none, and reads each from the row before it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.packing import num_tokens, pack
from rosd_fast.types import DistillSample


@st.composite
def sample_lists(draw, max_size=12):
    samples = []
    for index in range(draw(st.integers(0, max_size))):
        length = draw(st.integers(1, 20))
        start = draw(st.integers(0, length - 1))
        base = 1000 * (index + 1)  # every token of every sample is another number
        samples.append(
            DistillSample(
                rollout_id=f"r{index}",
                student_prompt_ids=tuple(range(base + 100, base + 100 + draw(st.integers(1, 9)))),
                teacher_prompt_ids=tuple(range(base + 200, base + 200 + draw(st.integers(1, 30)))),
                completion_ids=tuple(range(base, base + length)),
                logprobs=tuple(-(base + place) / 8 for place in range(length)),
                start=start,
                end=draw(st.integers(start + 1, length)),
                weight=draw(st.sampled_from([1.0, 0.5])),
            )
        )
    return samples


@settings(max_examples=150, deadline=None)
@given(samples=sample_lists(), max_tokens=st.integers(1, 150))
def test_packing(samples, max_tokens):
    batches = pack(samples, max_tokens=max_tokens)
    by_id = {sample.rollout_id: sample for sample in samples}
    order = [rollout_id for batch in batches for rollout_id in batch.rollout_ids]
    assert sorted(order) == sorted(by_id)
    assert sum(batch.num_distilled for batch in batches) == sum(s.num_distilled for s in samples)
    distilled = sorted(token for batch in batches for token in batch.token_ids.tolist())
    expected = [token for s in samples for token in s.completion_ids[s.start : s.end]]
    assert distilled == sorted(expected) and len(set(distilled)) == len(distilled)
    for batch in batches:
        members = [by_id[rollout_id] for rollout_id in batch.rollout_ids]
        check_batch(batch, members)
        assert list(batch.rollout_ids) == sorted(batch.rollout_ids, key=lambda name: int(name[1:]))
        cost = len(batch.student.input_ids) + len(batch.teacher.input_ids)
        assert cost == sum(map(num_tokens, members))
        assert cost <= max_tokens or len(members) == 1


def check_batch(batch, members):
    rows = [
        (index, member, place)
        for index, member in enumerate(members)
        for place in range(member.start, member.end)
    ]
    assert batch.sample_index.tolist() == [index for index, _, _ in rows]
    assert batch.token_ids.tolist() == [m.completion_ids[place] for _, m, place in rows]
    assert batch.weights.tolist() == [m.weight for _, m, _ in rows]
    assert batch.rollout_logprobs.tolist() == [m.logprobs[place] for _, m, place in rows]
    for packed, prompts in (
        (batch.student, [m.student_prompt_ids for m in members]),
        (batch.teacher, [m.teacher_prompt_ids for m in members]),
    ):
        inputs, bounds = packed.input_ids.tolist(), packed.cu_seqlens
        assert bounds[0] == 0 and bounds[-1] == len(inputs) and len(bounds) == len(members) + 1
        for (first, last), member, prompt in zip(pairwise(bounds), members, prompts, strict=True):
            assert tuple(inputs[first:last]) == prompt + member.completion_ids[: member.end - 1]
            assert packed.position_ids[first:last].tolist() == list(range(last - first))
        gather = packed.gather.tolist()
        assert len(gather) == batch.num_distilled
        for row, (index, member, place) in zip(gather, rows, strict=True):
            assert bounds[index] <= row < bounds[index + 1]
            assert row - bounds[index] == len(prompts[index]) + place - 1
            if row + 1 < bounds[index + 1]:
                assert inputs[row + 1] == member.completion_ids[place]


@settings(max_examples=50, deadline=None)
@given(samples=sample_lists(), max_tokens=st.integers(1, 150))
def test_packing_is_repeatable_and_no_worse_than_twice_the_volume(samples, max_tokens):
    batches = pack(samples, max_tokens=max_tokens)
    again = pack(samples, max_tokens=max_tokens)
    assert [batch.rollout_ids for batch in batches] == [batch.rollout_ids for batch in again]
    # Any two micro-batches of first-fit are together over the budget.
    costs = {sample.rollout_id: num_tokens(sample) for sample in samples}
    loads = [sum(costs[name] for name in batch.rollout_ids) for batch in batches]
    assert all(one + other > max_tokens for one, other in pairwise(loads))


def make_sample(rollout_id, length):
    return DistillSample(
        rollout_id=rollout_id,
        student_prompt_ids=(1,),
        teacher_prompt_ids=(2,),
        completion_ids=tuple(range(length)),
        logprobs=(0.0,) * length,
        start=length - 1,
        end=length,
    )


def test_first_fit_decreasing_and_dtypes():
    samples = [make_sample(name, length) for name, length in zip("abcd", (2, 4, 3, 1), strict=True)]
    assert [num_tokens(sample) for sample in samples] == [4, 8, 6, 2]
    batches = pack(samples, max_tokens=10)
    assert [batch.rollout_ids for batch in batches] == [("b", "d"), ("a", "c")]
    batch = batches[0]
    for tensor in (batch.token_ids, batch.sample_index, batch.student.gather):
        assert tensor.dtype == torch.int64
    for tensor in (batch.student.input_ids, batch.teacher.position_ids):
        assert tensor.dtype == torch.int64
    assert batch.weights.dtype == batch.rollout_logprobs.dtype == torch.float32


def test_nothing_to_pack_and_no_budget():
    assert pack([], max_tokens=8) == []
    with pytest.raises(ValueError, match="max_tokens"):
        pack([], max_tokens=0)


def test_gathered_rows_predict_the_distilled_tokens(tiny_llama):
    model = tiny_llama(dtype=torch.float64)
    samples = [
        DistillSample(
            rollout_id=f"r{index}",
            student_prompt_ids=(11, 12, 13),
            teacher_prompt_ids=(21, 22, 23, 24, 25 + index),
            completion_ids=(31, 32, 33, 34 + index, 35),
            logprobs=(0.0,) * 5,
            start=start,
            end=end,
        )
        for index, (start, end) in enumerate([(0, 1), (2, 5), (4, 5), (0, 5)])
    ]
    (batch,) = pack(samples, max_tokens=200)
    for packed, name in ((batch.student, "student"), (batch.teacher, "teacher")):
        rows = []  # logits of the packed rows, one sequence at a time
        for first, last in pairwise(packed.cu_seqlens):
            rows.append(model(input_ids=packed.input_ids[None, first:last]).logits[0])
        logits = torch.cat(rows)[packed.gather]
        expected = []
        for sample in samples:
            prompt_ids = getattr(sample, f"{name}_prompt_ids")
            whole = model(input_ids=torch.tensor([prompt_ids + sample.completion_ids])).logits[0]
            before = len(prompt_ids) - 1
            expected.append(whole[before + sample.start : before + sample.end])
        torch.testing.assert_close(logits, torch.cat(expected))
