"""Packing neither loses nor repeats a distilled token, and reads each from the row before it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise, takewhile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.batch.packing import Part, StepSequences, pack
from rosd_fast.batch.prefixes import PrefixIndex, common_length
from rosd_fast.model.head import head, logits
from rosd_fast.model.layouts import hidden_states
from rosd_fast.types import TrainSample


def part_of(samples, *, min_shared=16, hidden_size=1024) -> Part:
    """All samples as one part."""
    step = StepSequences(samples, min_shared=min_shared, hidden_size=hidden_size)
    return step.part(range(len(samples)))


@st.composite
def sample_lists(draw, max_size=12):
    """Samples of a few groups over few token ids, so that prefixes are shared by chance, too."""
    ids = st.lists(st.integers(1, 3), min_size=1, max_size=9).map(tuple)
    problems = [(draw(ids), draw(ids)) for _ in range(draw(st.integers(1, 3)))]
    samples = []
    for index in range(draw(st.integers(0, max_size))):
        prompt_ids, teacher_ids = draw(st.sampled_from(problems))
        completion_ids = draw(ids)
        start = draw(st.integers(0, len(completion_ids) - 1))
        samples.append(
            TrainSample(
                rollout_id=f"r{index}",
                problem_id="p",
                student_prompt_ids=prompt_ids,
                teacher_prompt_ids=teacher_ids + draw(ids),
                completion_ids=completion_ids,
                logprobs=tuple(-(1000 * index + place) / 8 for place in range(len(completion_ids))),
                start=start,
                end=draw(st.integers(start + 1, len(completion_ids))),
                weight=draw(st.sampled_from([1.0, 0.5])),
            )
        )
    return samples


@settings(max_examples=200, deadline=None)
@given(
    samples=sample_lists(),
    max_tokens=st.integers(1, 150),
    min_shared=st.integers(0, 6),
    num_ranks=st.integers(1, 4),
)
def test_packing(samples, max_tokens, min_shared, num_ranks):
    batches = pack(samples, max_tokens=max_tokens, min_shared=min_shared, num_ranks=num_ranks)
    assert len(batches) % num_ranks == 0 and (batches != []) == (samples != [])
    # A turn in which all are empty would be wasted.
    turns = [batches[i : i + num_ranks] for i in range(0, len(batches), num_ranks)]
    assert all(any(batch.rollout_ids for batch in turn) for turn in turns)
    empty = [batch for batch in batches if not batch.rollout_ids]
    batches = [batch for batch in batches if batch.rollout_ids]
    assert all(batch.num_distilled == 0 and batch.num_tokens == 2 for batch in empty)
    by_id = {sample.rollout_id: sample for sample in samples}
    order = [rollout_id for batch in batches for rollout_id in batch.rollout_ids]
    assert sorted(order) == sorted(by_id)
    assert sum(batch.num_distilled for batch in batches) == sum(s.num_tokens for s in samples)
    for batch in batches:
        members = [by_id[rollout_id] for rollout_id in batch.rollout_ids]
        check_batch(batch, members, min_shared)
        assert list(batch.rollout_ids) == sorted(batch.rollout_ids, key=lambda name: int(name[1:]))
        assert batch.num_tokens == part_of(members, min_shared=min_shared).num_tokens
        assert batch.num_tokens <= max_tokens or len(members) == 1


def check_batch(batch, members, min_shared):
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
        assert bounds[0] == 0 and bounds[-1] == len(inputs)
        assert all(length > 0 for length in packed.lengths)
        for row in range(len(inputs)):
            sequence = packed.sequence(row)
            assert sequence[-1] == inputs[row]
            assert packed.position_ids[row] == len(sequence) - 1
        gather = packed.gather.tolist()
        assert len(gather) == batch.num_distilled
        for row, (index, member, place) in zip(gather, rows, strict=True):
            assert tuple(packed.sequence(row)) == prompts[index] + member.completion_ids[:place]
        whole = [
            prompt + member.completion_ids[: member.end - 1]
            for prompt, member in zip(prompts, members, strict=True)
        ]
        most = sum(map(len, whole))
        fewest = len({ids[:end] for ids in whole for end in range(1, len(ids) + 1)})
        if min_shared < 2:
            assert len(inputs) == (fewest if min_shared else most)
        assert fewest <= len(inputs) <= most


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(
        st.lists(st.integers(1, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=7
    ),
    min_shared=st.integers(0, 5),
    data=st.data(),
)
def test_prefix_tree(sequences, min_shared, data):
    """The tree of a subset is a partition of its sequences, whatever else the index holds."""
    indices = range(len(sequences))
    members = sorted(data.draw(st.sets(st.sampled_from(indices), min_size=1)))
    tree = PrefixIndex(sequences).tree(members, min_shared=min_shared)
    found = dict.fromkeys(members, ())
    for place, segment in enumerate(tree):
        assert segment.parent < place and segment.length > 0 and segment.members
        if segment.parent >= 0:
            parent = tree[segment.parent]
            assert set(segment.members) <= set(parent.members) and parent.end == segment.start
        texts = {sequences[index][: segment.end] for index in segment.members}
        assert len(texts) == 1  # equal up to its end
        equal = len({sequences[index] for index in segment.members}) == 1
        assert len(segment.members) == 1 or equal or segment.length >= min_shared > 0
        for index in segment.members:
            assert len(found[index]) == segment.start
            found[index] += sequences[index][segment.start : segment.end]
    assert found == {index: sequences[index] for index in members}


@settings(max_examples=100, deadline=None)
@given(
    common=st.lists(st.integers(0, 1), max_size=9).map(tuple),
    tails=st.lists(st.lists(st.integers(0, 1), max_size=9).map(tuple), min_size=1, max_size=5),
)
def test_common_length(common, tails):
    sequences = [common + tail for tail in tails]
    length = PrefixIndex(sequences).common_length(range(len(sequences)))
    assert length == len(common_prefix(sequences))
    assert common_length(sequences[0], sequences[-1]) >= length


class Token(int):
    """A token id that counts how often any token is compared or hashed."""

    num_reads = 0

    def __eq__(self, other):
        Token.num_reads += 1
        return int.__eq__(self, other)

    def __lt__(self, other):
        Token.num_reads += 1
        return int.__lt__(self, other)

    def __hash__(self):
        Token.num_reads += 1
        return int.__hash__(self)


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_packing_reads_each_token_fewer_than_three_times(num_ranks):
    """32 groups of 8. Reading all of a part whenever it grows takes about 7 times."""
    g = torch.Generator().manual_seed(3)

    def ids(length):
        return tuple(map(Token, torch.randint(0, 10_000, (length,), generator=g).tolist()))

    samples = []
    for group in range(32):
        prompt = ids(100)
        for index in range(8):
            completion = ids(150)
            samples.append(
                TrainSample(
                    rollout_id=f"{group}/{index}",
                    problem_id=str(group),
                    # Equal tokens, not the same objects: these would be equal without being read.
                    student_prompt_ids=tuple(map(Token, range(50))) + tuple(map(Token, prompt)),
                    teacher_prompt_ids=tuple(map(Token, range(50)))
                    + tuple(map(Token, prompt))
                    + ids(60),
                    completion_ids=completion,
                    logprobs=(0.0,) * len(completion),
                    start=50,
                    end=len(completion),
                )
            )
    num_tokens = part_of(samples, min_shared=0).num_tokens
    Token.num_reads = 0
    batches = pack(samples, max_tokens=8192, num_ranks=num_ranks)
    assert sum(len(batch.rollout_ids) for batch in batches) == len(samples)
    assert num_tokens == 256 * (299 + 359)
    assert num_tokens / 2 < Token.num_reads < 3 * num_tokens, Token.num_reads / num_tokens


def common_prefix(sequences):
    shortest = min(map(len, sequences))
    alike = (len({ids[place] for ids in sequences}) == 1 for place in range(shortest))
    return sequences[0][: sum(takewhile(bool, alike))]


@settings(max_examples=50, deadline=None)
@given(samples=sample_lists(), max_tokens=st.integers(1, 150), min_shared=st.integers(0, 6))
def test_packing_is_deterministic_and_at_most_twice_the_volume(samples, max_tokens, min_shared):
    batches = pack(samples, max_tokens=max_tokens, min_shared=min_shared)
    again = pack(samples, max_tokens=max_tokens, min_shared=min_shared)
    assert [batch.rollout_ids for batch in batches] == [batch.rollout_ids for batch in again]
    # Any two micro-batches of first-fit exceed the budget together, if nothing is shared.
    loads = [num_tokens_alone(batch, samples) for batch in batches]
    assert all(one + other > max_tokens for one, other in pairwise(loads))


def num_tokens_alone(batch, samples):
    """Tokens when nothing is shared."""
    members = [s for s in samples if s.rollout_id in batch.rollout_ids]
    return part_of(members, min_shared=0).num_tokens


def test_a_group_shares_its_prompt_and_stays_together():
    groups = [
        TrainSample(
            rollout_id=f"{group}/{index}",
            problem_id=str(group),
            student_prompt_ids=(group, *range(20)),
            teacher_prompt_ids=(group, *range(20), 70 + index, *range(9)),
            completion_ids=(80 + index, 5, 6, 7),
            logprobs=(0.0,) * 4,
            start=0,
            end=3,
        )
        for index in range(3)
        for group in (50, 60)
    ]
    # 21 + 3 * 2 for the student, and for the teacher 21 + 3 * (10 + 2)
    first_group = [s for s in groups if s.rollout_id.startswith("50")]
    assert part_of(first_group).num_tokens == 27 + 57
    first, second = pack(groups, max_tokens=100)
    assert first.rollout_ids == ("50/0", "50/1", "50/2")
    assert second.rollout_ids == ("60/0", "60/1", "60/2")
    assert first.student.lengths == (21, 2, 2, 2) and first.student.parents == (-1, 0, 0, 0)
    assert first.teacher is not None
    assert first.teacher.lengths == (21, 12, 12, 12) and first.num_tokens == 84
    # The first completion token of each is predicted by the last token of the one prompt.
    assert first.student.gather.tolist() == [20, 21, 22, 20, 23, 24, 20, 25, 26]
    # A group over the budget is split; prefixes are shared within each part.
    parts = pack(groups, max_tokens=70)
    assert [part.rollout_ids for part in parts] == [
        ("50/0", "50/1"),
        ("60/0", "60/1"),
        ("50/2",),
        ("60/2",),
    ]
    whole = pack(groups, max_tokens=1000, min_shared=0)[0]
    assert whole.num_tokens == 6 * (23 + 33) and set(whole.student.parents) == {-1}


def make_sample(rollout_id, length):
    return TrainSample(
        rollout_id=rollout_id,
        problem_id="p",
        student_prompt_ids=(100 + length,),
        teacher_prompt_ids=(2,),
        completion_ids=tuple(range(length)),
        logprobs=(0.0,) * length,
        start=length - 1,
        end=length,
    )


def test_first_fit_decreasing_and_dtypes():
    samples = [make_sample(name, length) for name, length in zip("abcd", (2, 4, 3, 1), strict=True)]
    assert [part_of([sample]).num_tokens for sample in samples] == [4, 8, 6, 2]
    batches = pack(samples, max_tokens=10)
    assert [batch.rollout_ids for batch in batches] == [("b", "d"), ("a", "c")]
    batch = batches[0]
    for tensor in (batch.token_ids, batch.sample_index, batch.student.gather):
        assert tensor.dtype == torch.int64
    assert batch.teacher is not None
    for tensor in (batch.student.input_ids, batch.teacher.position_ids):
        assert tensor.dtype == torch.int64
    assert batch.weights.dtype == batch.rollout_logprobs.dtype == torch.float32


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "expected"),
    [
        ([[20] * 8], 4, [2, 2, 2, 2]),  # a group is divided
        ([[20] * 4] * 4, 4, [4, 4, 4, 4]),
        ([[90], [20], [20], [20]], 2, [1, 3]),  # by FLOPs, not by count
        ([[20]], 3, [1, 0, 0]),
    ],
    ids=["one group", "groups", "unequal", "too few"],
)
def test_ranks_get_similar_loads(lengths, num_ranks, expected):
    samples = [
        dataclasses.replace(
            make_sample(f"{group}/{index}", length),
            student_prompt_ids=(50 + group,) * 30,
            teacher_prompt_ids=(70 + group,) * 30,
        )
        for group, own in enumerate(lengths)
        for index, length in enumerate(own)
    ]
    batches = pack(samples, max_tokens=100_000, num_ranks=num_ranks, hidden_size=64)
    assert sorted(len(batch.rollout_ids) for batch in batches) == sorted(expected)


@settings(max_examples=100, deadline=None)
@given(samples=sample_lists(max_size=24), num_ranks=st.integers(2, 4))
def test_no_rank_has_much_more_than_its_fair_share(samples, num_ranks):
    """With room for all, the largest load is at most a fair share plus the largest part."""
    options: dict[str, Any] = {"min_shared": 2, "hidden_size": 16}
    batches = pack(samples, max_tokens=10_000, num_ranks=num_ranks, **options)
    by_id = {sample.rollout_id: sample for sample in samples}
    loads = [
        part_of([by_id[i] for i in batch.rollout_ids], **options).flops
        for batch in batches
        if batch.rollout_ids
    ]
    alone = [part_of([sample], **options).flops for sample in samples]
    assert len(batches) in (0, num_ranks)
    assert max(loads, default=0) <= sum(alone) / num_ranks + max(
        [*alone, sum(alone) / num_ranks, 0]
    )


def test_flops_by_hand():
    sample = make_sample("a", 5)
    length = len(sample.student_prompt_ids) + sample.end - 1
    pairs = length * (length + 1) / 2
    # 24 H^2 per token and 4 H per pair; the student counts three times.
    own = (24 * 64**2 * length + 4 * 64 * pairs) / (24 * 64**2)
    assert len(sample.teacher_prompt_ids or ()) == len(sample.student_prompt_ids)
    assert part_of([sample], min_shared=0, hidden_size=64).flops == pytest.approx(4 * own)


def test_nothing_to_pack_and_no_budget():
    assert pack([], max_tokens=8) == []
    with pytest.raises(ValueError, match="max_tokens"):
        pack([], max_tokens=0)


@pytest.mark.parametrize("min_shared", [0, 1, 3, 16])
def test_gathered_rows_predict_the_distilled_tokens(tiny_llama, min_shared):
    model = tiny_llama(dtype=torch.float64)
    samples = [
        TrainSample(
            rollout_id=f"r{index}",
            problem_id="p",
            student_prompt_ids=(11, 12, 13),
            teacher_prompt_ids=(21, 22, 23, 24, 25 + index),
            completion_ids=(31, 32, 33, 34 + index, 35),
            logprobs=(0.0,) * 5,
            start=start,
            end=end,
        )
        for index, (start, end) in enumerate([(0, 1), (2, 5), (4, 5), (0, 5)])
    ]
    (batch,) = pack(samples, max_tokens=200, min_shared=min_shared)
    for packed, name in ((batch.student, "student"), (batch.teacher, "teacher")):
        assert packed is not None
        actual = logits(hidden_states(model, packed)[packed.gather], head(model))
        expected = []
        for sample in samples:
            prompt_ids = getattr(sample, f"{name}_prompt_ids")
            whole = model(input_ids=torch.tensor([prompt_ids + sample.completion_ids])).logits[0]
            before = len(prompt_ids) - 1
            expected.append(whole[before + sample.start : before + sample.end])
        torch.testing.assert_close(actual, torch.cat(expected))
