"""Samples into micro-batches: sequences end to end, without padding, what they share only once.

A micro-batch holds each of its samples twice, after the student's prompt and after the teacher's.
Token t of a completion is predicted at the row before it, so a sequence is

    input  = prompt + completion[: end - 1]
    gather = len(prompt) - 1 + [start, ..., end - 1]

and neither the last distilled token nor what follows it is an input.

The sequences of a micro-batch form a prefix tree. Tokens that two or more of them begin with are
one segment, if they are at least `min_shared`, and go through the model once: the student's prompt
of a group, the teacher's system turn and problem, and where reflections agree, more. The hidden
states of a causal model depend on the tokens before alone, so nothing changes but the cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rosd_fast.types import DistillSample, PackedBatch, PackedSequences

MIN_SHARED = 16  # tokens; below, a segment of its own costs more than it saves


def pack(
    samples: Sequence[DistillSample],
    *,
    max_tokens: int,
    min_shared: int = MIN_SHARED,
    num_ranks: int = 1,
    hidden_size: int = 1024,
) -> list[PackedBatch]:
    """Micro-batches of at most `max_tokens` input tokens, student's plus teacher's; repeatable.

    min_shared: the fewest tokens that are worth a segment of their own, 0: nothing is shared.
    num_ranks: the result is dealt to them in turns, rank 0 first, and its length is a multiple of
    it. hidden_size: of the model, which says how much attention counts among the FLOPs.

    First-fit decreasing: the costliest first, each into the first micro-batch that has room for it.
    What is placed is a group, the samples of one student prompt, or where it is over `max_tokens`
    as many of its samples as fit; a sample that is longer is a micro-batch of its own. Within one,
    samples keep their order. For several ranks, micro-batches are as few, but balanced by FLOPs:
    the costliest part goes where least is, and those that ranks compute at the same time are alike.
    A group is divided where it is more than a rank's share; ranks without a sample get an empty
    micro-batch. Raises ValueError when `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
    parts = _parts(samples, max_tokens=max_tokens, min_shared=min_shared)
    if num_ranks > 1 and samples:
        bins = _balanced(samples, parts, max_tokens, min_shared, num_ranks, hidden_size)
        return [
            _batch([samples[index] for index in sorted(members)], min_shared) for members in bins
        ]
    costs = [num_tokens([samples[i] for i in part], min_shared=min_shared) for part in parts]
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(
        range(len(parts)), key=lambda index: -costs[index]
    ):  # stable: ties in order
        cost = costs[index]
        place = next((place for place, free in enumerate(room) if cost <= free), None)
        if place is None:
            bins.append([*parts[index]])
            room.append(max_tokens - cost)
        else:
            bins[place] += parts[index]
            room[place] -= cost
    return [_batch([samples[index] for index in sorted(members)], min_shared) for members in bins]


def num_tokens(samples: Sequence[DistillSample], *, min_shared: int = MIN_SHARED) -> int:
    """Input tokens of a micro-batch of `samples`, student's plus teacher's."""
    return sum(
        segment.length
        for prompted in _prompted(samples)
        for segment in prefix_tree(prompted, min_shared=min_shared)
    )


def flops(samples: Sequence[DistillSample], *, min_shared: int, hidden_size: int) -> float:
    """Of a micro-batch, as a multiple of a token's through the weights of a layer.

    A token costs 24 hidden_size^2, a pair of query and key 4 hidden_size. The student's backward
    pass is two forward ones.
    """
    student, teacher = (
        sum(
            segment.length
            + (segment.start + segment.end + 1) * segment.length / 2 / (6 * hidden_size)
            for segment in prefix_tree(prompted, min_shared=min_shared)
        )
        for prompted in _prompted(samples)
    )
    return 3 * student + teacher


def _balanced(
    samples: Sequence[DistillSample],
    parts: list[list[int]],
    max_tokens: int,
    min_shared: int,
    num_ranks: int,
    hidden_size: int,
) -> list[list[int]]:
    """Micro-batches by the samples' indices, in the order that deals them to the ranks."""

    def cost(part: Sequence[int]) -> float:
        return flops([samples[i] for i in part], min_shared=min_shared, hidden_size=hidden_size)

    def size(part: Sequence[int]) -> int:
        return num_tokens([samples[i] for i in part], min_shared=min_shared)

    queue = [(cost(part), part) for part in parts]
    share = sum(own for own, _ in queue) / num_ranks
    queue.reverse()
    parts, costs = [], []
    while queue:
        own, part = queue.pop()
        if len(part) > 1 and own > share:
            middle = len(part) // 2
            queue += [(cost(half), half) for half in (part[middle:], part[:middle])]
        else:
            parts.append(part)
            costs.append(own)
    sizes = [size(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda index: -costs[index])
    count = num_ranks * -(-sum(sizes) // (max_tokens * num_ranks))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        load, room = [0.0] * count, [max_tokens] * count
        for index in order:
            fitting = [i for i in range(count) if sizes[index] <= room[i] or not bins[i]]
            if not fitting:
                break
            place = min(fitting, key=lambda i: load[i])
            bins[place] += parts[index]
            load[place] += costs[index]
            room[place] -= sizes[index]
        else:
            # Alike ones side by side, as ranks wait for the slowest.
            found = [bins[i] for i in sorted(range(count), key=lambda i: -load[i])]
            used = sum(bool(members) for members in found)
            return found[: num_ranks * -(-used // num_ranks)]
        count += num_ranks


@dataclass(slots=True)
class Segment:
    """Tokens [start, end) of the sequences `members`, which are alike up to `end`."""

    start: int
    end: int
    parent: int  # index of the segment before, -1: none
    members: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.end - self.start


def prefix_tree(sequences: Sequence[tuple[int, ...]], *, min_shared: int) -> list[Segment]:
    """The segments of all sequences, parents first; none is empty.

    A shorter run that several have in common is laid out for each of them, unless they are equal.

    >>> [(s.start, s.end, s.parent) for s in prefix_tree([(1, 2, 3, 4), (1, 2, 5)], min_shared=2)]
    [(0, 2, -1), (2, 4, 0), (2, 3, 0)]
    """
    tree: list[Segment] = []
    if min_shared == 0:
        return [Segment(0, len(ids), -1, [index]) for index, ids in enumerate(sequences) if ids]
    # (members, tokens laid out, tokens known to be alike, the segment before)
    stack = [([*range(len(sequences))], 0, 0, -1)]
    while stack:
        members, start, alike, parent = stack.pop()
        if len(members) == 1:
            end = len(sequences[members[0]])
        else:
            end = common_length([sequences[index] for index in members], alike)
        if end > start and (len(members) == 1 or end - start >= min_shared):
            tree.append(Segment(start, end, parent, members))
            start, parent = end, len(tree) - 1
        if len(members) == 1:
            continue
        branches: dict[int | None, list[int]] = defaultdict(list)
        for index in members:
            ids = sequences[index]
            branches[ids[end] if end < len(ids) else None].append(index)
        # What ends here ends alike: nothing is left of it, or one segment for all.
        if (ended := branches.pop(None, None)) and end > start:
            tree.append(Segment(start, end, parent, ended))
        stack += [(branch, start, end, parent) for branch in reversed(branches.values())]
    return tree


def common_length(sequences: Sequence[tuple[int, ...]], alike: int = 0) -> int:
    """Tokens that all of `sequences` begin with; the first `alike` are known to be the same."""
    # The least and the greatest differ before any other two do.
    first, last = min(sequences), max(sequences)
    low, high = alike, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _parts(
    samples: Sequence[DistillSample], *, max_tokens: int, min_shared: int
) -> list[list[int]]:
    """The samples by index in parts that are placed as one."""
    if min_shared == 0:
        return [[index] for index in range(len(samples))]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.student_prompt_ids].append(index)
    parts = []
    for group in groups.values():
        part: list[int] = []
        for index in group:
            grown = [samples[i] for i in (*part, index)]
            if part and num_tokens(grown, min_shared=min_shared) > max_tokens:
                parts.append(part)
                part = []
            part.append(index)
        parts.append(part)
    return parts


def _prompted(samples: Sequence[DistillSample]) -> tuple[list[tuple[int, ...]], ...]:
    """The input ids of each sample after the student's prompt, and after the teacher's."""
    return tuple(
        [
            (*prompt_ids, *sample.completion_ids[: sample.end - 1])
            for prompt_ids, sample in zip(prompts, samples, strict=True)
        ]
        for prompts in (
            [sample.student_prompt_ids for sample in samples],
            [sample.teacher_prompt_ids for sample in samples],
        )
    )


def _batch(samples: Sequence[DistillSample], min_shared: int) -> PackedBatch:
    if not samples:
        return empty_batch()

    def rows(value: Callable[[DistillSample], Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([item for sample in samples for item in value(sample)], dtype=dtype)

    counts = torch.tensor([sample.num_distilled for sample in samples])
    student, teacher = (
        _sequences(sequences, [sample.num_distilled for sample in samples], min_shared)
        for sequences in _prompted(samples)
    )
    return PackedBatch(
        rollout_ids=tuple(sample.rollout_id for sample in samples),
        student=student,
        teacher=teacher,
        token_ids=rows(
            lambda sample: sample.completion_ids[sample.start : sample.end], torch.int64
        ),
        weights=rows(lambda sample: [sample.weight] * sample.num_distilled, torch.float32),
        rollout_logprobs=rows(
            lambda sample: sample.logprobs[sample.start : sample.end], torch.float32
        ),
        sample_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
    )


def empty_batch() -> PackedBatch:
    """No sample: one token that nothing is read of, so that a rank computes along with others."""
    nothing = torch.empty(0, dtype=torch.int64)
    sequences = PackedSequences(
        input_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=(0, 1),
        gather=nothing,
    )
    return PackedBatch(
        rollout_ids=(),
        student=sequences,
        teacher=sequences,
        token_ids=nothing,
        weights=torch.empty(0),
        rollout_logprobs=torch.empty(0),
        sample_index=nothing,
    )


def _sequences(
    sequences: Sequence[tuple[int, ...]], counts: Sequence[int], min_shared: int
) -> PackedSequences:
    """Lay the sequences out; the last `counts[i]` rows of sequence i are gathered."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    cu_seqlens = [0]
    rows: list[list[int]] = [[] for _ in sequences]  # of each sequence, from its first token on
    tree = prefix_tree(sequences, min_shared=min_shared)
    for segment in tree:
        for index in segment.members:
            rows[index] += range(len(input_ids), len(input_ids) + segment.length)
        input_ids += sequences[segment.members[0]][segment.start : segment.end]
        position_ids += range(segment.start, segment.end)
        cu_seqlens.append(len(input_ids))
    gather = [row for own, count in zip(rows, counts, strict=True) for row in own[-count:]]
    return PackedSequences(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        cu_seqlens=tuple(cu_seqlens),
        gather=torch.tensor(gather, dtype=torch.int64),
        parents=tuple(segment.parent for segment in tree),
    )
