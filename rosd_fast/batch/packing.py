"""Packing: samples into micro-batches without padding, with shared prefixes stored once.

A micro-batch holds each of its samples after the student's prompt, and each distilled sample also
after the teacher's. Token t of a completion is predicted at the row before it, so a sequence is

    input  = prompt + completion[: end - 1]
    gather = len(prompt) - 1 + [start, ..., end - 1]

and neither the last trained token nor what follows it is an input.

The sequences of a micro-batch form a prefix tree. A prefix of at least `min_shared` tokens that two
or more of them have in common is one segment and goes through the model once: the student's prompt
of a group, the teacher's system turn and problem, more where reflections agree, and all of a
rollout that has two samples. In a causal model a hidden state depends only on earlier tokens, so
sharing changes the cost and nothing else.

For a model that cannot run packed sequences (`rosd_fast.model.layouts`), nothing is shared, and the
sequences of a micro-batch are rows that are padded to the longest: sequences of similar length make
up a micro-batch, and the padding counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from rosd_fast.batch.prefixes import PrefixIndex
from rosd_fast.batch.tensors import to_tensor
from rosd_fast.types import PackedBatch, PackedSequences, PolicyTokens, TrainSample

MIN_SHARED = 16  # tokens; a shorter segment costs more than it saves


def pack(
    samples: Sequence[TrainSample],
    *,
    max_tokens: int,
    min_shared: int = MIN_SHARED,
    num_ranks: int = 1,
    hidden_size: int = 1024,
    padded: bool = False,
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
    padded: the sequences will be padded. Samples are sorted by length, those of a micro-batch are
        neighbours, and `max_tokens` bounds the tokens with their padding.

    Raises ValueError if `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
    if not samples:
        return []
    step = StepSequences(samples, min_shared=0 if padded else min_shared, hidden_size=hidden_size)
    if padded:
        bins = neighbours(step, max_tokens, num_ranks)
        return [step.batch(sorted(members)) for members in bins]
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
    student, teacher: the sequences after the student's prompts and after the teacher's; a sample
        without a teacher's prompt has an empty one.
    has_distilled, has_policy: whether any sample is distilled, and whether any has another loss.
    min_shared, hidden_size: as in `pack`.
    """

    def __init__(
        self, samples: Sequence[TrainSample], *, min_shared: int, hidden_size: int
    ) -> None:
        self.samples = samples
        self.student = PrefixIndex([inputs(s.student_prompt_ids, s) for s in samples])
        self.teacher = PrefixIndex([inputs(s.teacher_prompt_ids, s) for s in samples])
        self.has_distilled = any(s.is_distilled for s in samples)
        self.has_policy = not all(s.is_distilled for s in samples)
        self.min_shared = min_shared
        self.hidden_size = hidden_size

    def part(self, indices: Sequence[int]) -> Part:
        """The part of these samples.

        A token costs 24 hidden_size^2 FLOPs in a layer, a pair of query and key 4 hidden_size. The
        student's backward pass costs as much as two forward passes.
        """
        num_tokens, flops = 0, 0.0
        sides = ((self.student, indices, 3), (self.teacher, self.distilled(indices), 1))
        for index, members, passes in sides:
            tree = index.tree(members, min_shared=self.min_shared) if members else []
            num_tokens += sum(segment.length for segment in tree)
            flops += passes * sum(
                segment.length
                + (segment.start + segment.end + 1) * segment.length / 2 / (6 * self.hidden_size)
                for segment in tree
            )
        return Part(tuple(indices), num_tokens, flops)

    def shape(self, index: int) -> tuple[int, int]:
        """The lengths of a sample's two sequences, student's and teacher's."""
        return len(self.student.sequences[index]), len(self.teacher.sequences[index])

    def distilled(self, indices: Sequence[int]) -> list[int]:
        """Those of these samples that are distilled."""
        return [index for index in indices if self.samples[index].is_distilled]

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """The micro-batch of these samples; without samples, of one token whose state nobody reads,
        for a rank that only takes part in the collectives."""
        samples = [self.samples[index] for index in indices]
        distilled = self.distilled(indices)
        student, student_rows = self._packed(self.student, indices)
        teacher, teacher_rows = self._packed(self.teacher, distilled)
        rows = SampleRows(samples, [index for index, s in enumerate(samples) if s.is_distilled])
        return PackedBatch(
            rollout_ids=tuple(sample.rollout_id for sample in samples),
            problem_ids=tuple(sample.problem_id for sample in samples),
            student=replace(student, gather=self._gather(student_rows, distilled)),
            teacher=replace(teacher, gather=self._gather(teacher_rows, distilled))
            if self.has_distilled
            else None,
            token_ids=rows.token_ids,
            weights=rows.weights,
            rollout_logprobs=rows.rollout_logprobs,
            sample_index=rows.sample_index,
            policy=self._policy(samples, indices, student_rows) if self.has_policy else None,
        )

    def _policy(
        self,
        samples: Sequence[TrainSample],
        indices: Sequence[int],
        student_rows: Mapping[int, list[int]],
    ) -> PolicyTokens:
        """The tokens of the samples that are not distilled."""
        places = [place for place, sample in enumerate(samples) if not sample.is_distilled]
        rows = SampleRows(samples, places)
        return PolicyTokens(
            gather=self._gather(student_rows, [indices[place] for place in places]),
            token_ids=rows.token_ids,
            weights=rows.weights,
            advantages=rows.tensor(lambda s: [s.advantage or 0.0] * s.num_tokens),
            is_likelihood=rows.tensor(lambda s: [s.advantage is None] * s.num_tokens, torch.bool),
            rollout_logprobs=rows.rollout_logprobs,
            sample_index=rows.sample_index,
        )

    def _packed(
        self, index: PrefixIndex, members: Sequence[int]
    ) -> tuple[PackedSequences, dict[int, list[int]]]:
        """The sequences `members` end to end, and by member the rows of all its tokens.

        Nothing is gathered yet. Without members: one token.
        """
        input_ids: list[int] = []
        position_ids: list[int] = []
        cu_seqlens = [0]
        rows: dict[int, list[int]] = {member: [] for member in members}
        tree = index.tree(members, min_shared=self.min_shared) if members else []
        for segment in tree:
            for member in segment.members:
                rows[member] += range(len(input_ids), len(input_ids) + segment.length)
            input_ids += index.sequences[segment.members[0]][segment.start : segment.end]
            position_ids += range(segment.start, segment.end)
            cu_seqlens.append(len(input_ids))
        if not tree:
            input_ids, position_ids, cu_seqlens = [0], [0], [0, 1]
        packed = PackedSequences(
            input_ids=to_tensor(input_ids),
            position_ids=to_tensor(position_ids),
            cu_seqlens=tuple(cu_seqlens),
            gather=torch.empty(0, dtype=torch.int64),
            parents=tuple(segment.parent for segment in tree),
        )
        return packed, rows

    def _gather(self, rows: Mapping[int, list[int]], members: Sequence[int]) -> torch.Tensor:
        """The rows that predict the trained tokens of `members`: the last ones of each sequence."""
        return to_tensor(
            row for member in members for row in rows[member][-self.samples[member].num_tokens :]
        )


class SampleRows:
    """Tensors with one row per trained token of some samples of a micro-batch.

    samples: all samples of the micro-batch. places: the indices of those that have rows.
    """

    def __init__(self, samples: Sequence[TrainSample], places: Sequence[int]) -> None:
        self.chosen = [samples[place] for place in places]
        counts = to_tensor(sample.num_tokens for sample in self.chosen)
        self.sample_index = torch.repeat_interleave(to_tensor(places), counts)

    def tensor(
        self,
        values: Callable[[TrainSample], Sequence[float]],
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The values of each sample's tokens, end to end."""
        return to_tensor(chain.from_iterable(map(values, self.chosen)), dtype)

    @property
    def token_ids(self) -> torch.Tensor:
        return self.tensor(lambda s: s.completion_ids[s.start : s.end], torch.int64)

    @property
    def weights(self) -> torch.Tensor:
        return self.tensor(lambda s: [s.weight] * s.num_tokens)

    @property
    def rollout_logprobs(self) -> torch.Tensor:
        return self.tensor(lambda s: s.logprobs[s.start : s.end])


def inputs(prompt_ids: tuple[int, ...] | None, sample: TrainSample) -> tuple[int, ...]:
    """The input ids of a sample after one of its prompts; empty where it has no such prompt."""
    return () if prompt_ids is None else (*prompt_ids, *sample.completion_ids[: sample.end - 1])


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


def neighbours(step: StepSequences, max_tokens: int, num_ranks: int) -> list[list[int]]:
    """Micro-batches of samples of similar length, the longest first: the samples' indices of each.

    Each has at most `max_tokens` tokens with the padding, or is one sample. Their number is a
    multiple of `num_ranks`; the largest ones are halved for that, as long as they can be.
    """

    def cost(members: Sequence[int]) -> int:
        """The tokens of a micro-batch, with the padding of both sides."""
        student, teacher = zip(*(step.shape(index) for index in members), strict=True)
        return len(members) * max(student) + sum(map(bool, teacher)) * max(teacher)

    bins: list[list[int]] = []
    for index in sorted(range(len(step.samples)), key=lambda i: (*step.shape(i), -i), reverse=True):
        if bins and cost([*bins[-1], index]) <= max_tokens:
            bins[-1].append(index)
        else:
            bins.append([index])
    while len(bins) % num_ranks and max(map(len, bins)) > 1:
        place = max(range(len(bins)), key=lambda i: (len(bins[i]) > 1, cost(bins[i])))
        middle = len(bins[place]) // 2
        bins[place : place + 1] = [bins[place][:middle], bins[place][middle:]]
    return bins + [[] for _ in range(-len(bins) % num_ranks)]


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
