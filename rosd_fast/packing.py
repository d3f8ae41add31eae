"""Samples into micro-batches: sequences laid end to end, without padding.

A micro-batch holds each of its samples twice, after the student's prompt and after the teacher's.
Token t of a completion is predicted at the row before it, so

    input  = prompt + completion[: end - 1]
    gather = len(prompt) - 1 + [start, ..., end - 1]

and neither the last distilled token nor what follows it is an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rosd_fast.types import DistillSample, PackedBatch, PackedSequences


def pack(samples: Sequence[DistillSample], *, max_tokens: int) -> list[PackedBatch]:
    """Micro-batches of at most `max_tokens` input tokens, student's plus teacher's; repeatable.

    First-fit decreasing: the longest sample first, each into the first micro-batch that has room
    for it. A sample longer than `max_tokens` is a micro-batch of its own. Within one, samples keep
    their order. Raises ValueError when `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
    costs = [num_tokens(sample) for sample in samples]
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(
        range(len(samples)), key=lambda index: -costs[index]
    ):  # stable: ties in order
        cost = costs[index]
        place = next((place for place, free in enumerate(room) if cost <= free), None)
        if place is None:
            bins.append([index])
            room.append(max_tokens - cost)
        else:
            bins[place].append(index)
            room[place] -= cost
    return [_batch([samples[index] for index in sorted(members)]) for members in bins]


def num_tokens(sample: DistillSample) -> int:
    """Input tokens of a sample, student's plus teacher's."""
    return len(sample.student_prompt_ids) + len(sample.teacher_prompt_ids) + 2 * (sample.end - 1)


def _batch(samples: Sequence[DistillSample]) -> PackedBatch:
    def rows(value: Callable[[DistillSample], Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([item for sample in samples for item in value(sample)], dtype=dtype)

    counts = torch.tensor([sample.num_distilled for sample in samples])
    return PackedBatch(
        rollout_ids=tuple(sample.rollout_id for sample in samples),
        student=_sequences([(sample.student_prompt_ids, sample) for sample in samples]),
        teacher=_sequences([(sample.teacher_prompt_ids, sample) for sample in samples]),
        token_ids=rows(
            lambda sample: sample.completion_ids[sample.start : sample.end], torch.int64
        ),
        weights=rows(lambda sample: [sample.weight] * sample.num_distilled, torch.float32),
        rollout_logprobs=rows(
            lambda sample: sample.logprobs[sample.start : sample.end], torch.float32
        ),
        sample_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
    )


def _sequences(prompted: Sequence[tuple[tuple[int, ...], DistillSample]]) -> PackedSequences:
    """Lay the samples end to end, each after its prompt."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    cu_seqlens = [0]
    gather: list[int] = []
    for prompt_ids, sample in prompted:
        offset = len(input_ids) + len(prompt_ids)  # row of the first completion token
        gather += range(offset + sample.start - 1, offset + sample.end - 1)
        input_ids += (*prompt_ids, *sample.completion_ids[: sample.end - 1])
        position_ids += range(len(input_ids) - cu_seqlens[-1])
        cu_seqlens.append(len(input_ids))
    return PackedSequences(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        cu_seqlens=tuple(cu_seqlens),
        gather=torch.tensor(gather, dtype=torch.int64),
    )
