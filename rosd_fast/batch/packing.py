"""Packing: samples into micro-batches without padding, with shared prefixes stored once.

A micro-batch holds each of its samples twice, after the student's prompt and after the teacher's.
Token t of a completion is predicted at the row before it, so a sequence is

    input  = prompt + completion[: end - 1]
    gather = len(prompt) - 1 + [start, ..., end - 1]

and neither the last distilled token nor what follows it is an input.

The sequences of a micro-batch form a prefix tree. A prefix of at least `min_shared` tokens that two
or more of them have in common is one segment and goes through the model once: the student's prompt
of a group, the teacher's system turn and problem, and more where reflections agree. In a causal
model a hidden state depends only on earlier tokens, so sharing changes the cost and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rosd_fast.batch.prefixes import PrefixIndex
from rosd_fast.types import DistillSample, PackedBatch, PackedSequences

MIN_SHARED = 16  # tokens; a shorter segment costs more than it saves


def pack(
    samples: Sequence[DistillSample],
    *,
    max_tokens: int,
    min_shared: int = MIN_SHARED,
    num_ranks: int = 1,
    hidden_size: int = 1024,
) -> list[PackedBatch]:
    """Micro-batches of at most `max_tokens` input tokens, student's plus teacher's; deterministic.

    The unit of placement is a *part*: all samples of one student prompt, split where they exceed
    `max_tokens`; a sample that is longer is a micro-batch of its own. On one rank, parts are placed
    first-fit decreasing (https://en.wikipedia.org/wiki/First-fit-decreasing_bin_packing): the
    largest first, each into the first micro-batch with room for it. For several ranks, each part
    goes to the least loaded of as few micro-batches, and micro-batches of similar cost run at the
    same time; a part that costs more than a rank's fair share is halved. Samples keep their order
    within a micro-batch.

    min_shared: shortest prefix in tokens that is stored once, 0: nothing is shared.
    num_ranks: micro-batches are dealt to this many ranks in turns, rank 0 first. Their number is a
        multiple of it; ranks without a sample get an empty micro-batch.
    hidden_size: the model's; it decides how much attention counts among the FLOPs.

    Raises ValueError if `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
    if not samples:
        return []
    step = StepSequences(samples, min_shared=min_shared, hidden_size=hidden_size)
    parts = divide(step, max_tokens)
    if num_ranks == 1:
        bins = first_fit(parts, max_tokens)
    else:
        bins = balance(halve_large(step, parts, num_ranks), max_tokens, num_ranks)
    return [step.batch(sorted(members)) for members in bins]


@dataclass(frozen=True, slots=True)
class Part:
    """Samples that are placed together.

    indices: of the samples, ascending.
    num_tokens: input tokens, student's plus teacher's.
    flops: student's and teacher's, in FLOPs of one token through the weights of one layer.
    """

    indices: tuple[int, ...]
    num_tokens: int
    flops: float


class StepSequences:
    """The input sequences of a step's samples, each read once for all subsets.

    samples: the samples of the step.
    student, teacher: the sequences after the student's prompts and after the teacher's.
    min_shared, hidden_size: as in `pack`.
    """

    def __init__(
        self, samples: Sequence[DistillSample], *, min_shared: int, hidden_size: int
    ) -> None:
        self.samples = samples
        self.student = PrefixIndex([inputs(s.student_prompt_ids, s) for s in samples])
        self.teacher = PrefixIndex([inputs(s.teacher_prompt_ids, s) for s in samples])
        self.min_shared = min_shared
        self.hidden_size = hidden_size

    def part(self, indices: Sequence[int]) -> Part:
        """The part of these samples.

        A token costs 24 hidden_size^2 FLOPs in a layer, a pair of query and key 4 hidden_size. The
        student's backward pass costs as much as two forward passes.
        """
        num_tokens, flops = 0, 0.0
        for index, passes in ((self.student, 3), (self.teacher, 1)):
            tree = index.tree(indices, min_shared=self.min_shared)
            num_tokens += sum(segment.length for segment in tree)
            flops += passes * sum(
                segment.length
                + (segment.start + segment.end + 1) * segment.length / 2 / (6 * self.hidden_size)
                for segment in tree
            )
        return Part(tuple(indices), num_tokens, flops)

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """The micro-batch of these samples."""
        if not indices:
            return empty_batch()
        samples = [self.samples[index] for index in indices]

        def rows(
            value: Callable[[DistillSample], Sequence[float]], dtype: torch.dtype
        ) -> torch.Tensor:
            return torch.tensor([x for sample in samples for x in value(sample)], dtype=dtype)

        counts = torch.tensor([sample.num_distilled for sample in samples])
        return PackedBatch(
            rollout_ids=tuple(sample.rollout_id for sample in samples),
            problem_ids=tuple(sample.problem_id for sample in samples),
            student=self._packed(self.student, indices),
            teacher=self._packed(self.teacher, indices),
            token_ids=rows(lambda s: s.completion_ids[s.start : s.end], torch.int64),
            weights=rows(lambda s: [s.weight] * s.num_distilled, torch.float32),
            rollout_logprobs=rows(lambda s: s.logprobs[s.start : s.end], torch.float32),
            sample_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
        )

    def _packed(self, index: PrefixIndex, members: Sequence[int]) -> PackedSequences:
        """The sequences `members` end to end; a sequence's last rows, one per distilled token, are
        gathered."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        cu_seqlens = [0]
        rows: dict[int, list[int]] = {member: [] for member in members}  # of all its tokens
        tree = index.tree(members, min_shared=self.min_shared)
        for segment in tree:
            for member in segment.members:
                rows[member] += range(len(input_ids), len(input_ids) + segment.length)
            input_ids += index.sequences[segment.members[0]][segment.start : segment.end]
            position_ids += range(segment.start, segment.end)
            cu_seqlens.append(len(input_ids))
        gather = [
            row for member in members for row in rows[member][-self.samples[member].num_distilled :]
        ]
        return PackedSequences(
            input_ids=torch.tensor(input_ids, dtype=torch.int64),
            position_ids=torch.tensor(position_ids, dtype=torch.int64),
            cu_seqlens=tuple(cu_seqlens),
            gather=torch.tensor(gather, dtype=torch.int64),
            parents=tuple(segment.parent for segment in tree),
        )


def inputs(prompt_ids: tuple[int, ...], sample: DistillSample) -> tuple[int, ...]:
    """The input ids of a sample after one of its prompts."""
    return (*prompt_ids, *sample.completion_ids[: sample.end - 1])


def divide(step: StepSequences, max_tokens: int) -> list[Part]:
    """The parts of a step: the samples of each student prompt, split where they exceed
    `max_tokens`.

    Where nothing is shared, a sample is a part.
    """
    if step.min_shared == 0:
        return [step.part([index]) for index in range(len(step.samples))]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, sample in enumerate(step.samples):
        groups[sample.student_prompt_ids].append(index)
    parts = []
    for group in groups.values():
        part = step.part(group[:1])
        for index in group[1:]:
            larger = step.part([*part.indices, index])
            if larger.num_tokens > max_tokens:
                parts.append(part)
                larger = step.part([index])
            part = larger
        parts.append(part)
    return parts


def first_fit(parts: Sequence[Part], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing by tokens: the samples' indices of each micro-batch."""
    bins: list[list[int]] = []
    room: list[int] = []
    for part in sorted(parts, key=lambda part: -part.num_tokens):  # stable: ties keep their order
        place = next((i for i, free in enumerate(room) if part.num_tokens <= free), None)
        if place is None:
            bins.append([*part.indices])
            room.append(max_tokens - part.num_tokens)
        else:
            bins[place] += part.indices
            room[place] -= part.num_tokens
    return bins


def halve_large(step: StepSequences, parts: Sequence[Part], num_ranks: int) -> list[Part]:
    """Halve parts until each costs at most a rank's fair share of the FLOPs, or is one sample."""
    fair_share = sum(part.flops for part in parts) / num_ranks
    halved = []
    stack = [*reversed(parts)]
    while stack:
        part = stack.pop()
        if len(part.indices) > 1 and part.flops > fair_share:
            middle = len(part.indices) // 2
            stack += [step.part(part.indices[middle:]), step.part(part.indices[:middle])]
        else:
            halved.append(part)
    return halved


def balance(parts: Sequence[Part], max_tokens: int, num_ranks: int) -> list[list[int]]:
    """Micro-batches of about equal FLOPs, as few as hold all parts: the samples' indices of each.

    Their number is a multiple of `num_ranks`. The costliest come first, so that micro-batches that
    run at the same time cost about as much: ranks wait for the slowest.
    """
    parts = sorted(parts, key=lambda part: -part.flops)  # stable: ties keep their order
    num_tokens = sum(part.num_tokens for part in parts)
    count = num_ranks * -(-num_tokens // (max_tokens * num_ranks))
    while (bins := fill_least_loaded(parts, max_tokens, count)) is None:
        count += num_ranks
    used = sum(bool(members) for members in bins)
    return bins[: num_ranks * -(-used // num_ranks)]


def fill_least_loaded(parts: Sequence[Part], max_tokens: int, count: int) -> list[list[int]] | None:
    """Place each part into the least loaded of `count` micro-batches with room for it.

    Returns the samples' indices of each micro-batch, the costliest first; None if a part fits
    nowhere.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    load, room = [0.0] * count, [max_tokens] * count
    for part in parts:
        fitting = [i for i in range(count) if part.num_tokens <= room[i] or not bins[i]]
        if not fitting:
            return None
        place = min(fitting, key=lambda i: load[i])
        bins[place] += part.indices
        load[place] += part.flops
        room[place] -= part.num_tokens
    return [bins[i] for i in sorted(range(count), key=lambda i: -load[i])]


def empty_batch() -> PackedBatch:
    """A micro-batch without samples, for a rank that only takes part in the collectives.

    It has one token, and no state of it is read.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    sequences = PackedSequences(
        input_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=(0, 1),
        gather=nothing,
    )
    return PackedBatch(
        rollout_ids=(),
        problem_ids=(),
        student=sequences,
        teacher=sequences,
        token_ids=nothing,
        weights=torch.empty(0),
        rollout_logprobs=torch.empty(0),
        sample_index=nothing,
    )
