"""The tokens that the diagnostics look at: a few, spread evenly over an update.

Student and teacher read all of a completion up to its last trained token, so their states at the
tokens before a located error exist already; only the output head has to be applied to them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from rosd_fast.types import DiagnosedTokens, PackedBatch, PackedSequences, TrainSample


def with_diagnosed(
    batches: Sequence[PackedBatch],
    samples: Sequence[TrainSample],
    *,
    located: Collection[str],
    max_tokens: int,
) -> list[PackedBatch]:
    """The micro-batches of an update with the tokens on which its diagnostics are computed.

    These are at most `max_tokens` distilled tokens, and at most as many tokens before the spans of
    the rollouts in `located`. The choice depends on the packing and on nothing random.

    samples: those that were packed.
    located: ids of rollouts whose span begins at a located error. Empty where a server computes the
        teacher's states, which it does for distilled tokens only.
    """
    starts = {
        sample.rollout_id: sample.start
        for sample in samples
        if sample.is_distilled and sample.rollout_id in located
    }
    before = [_rows_before(batch, starts) for batch in batches]
    rows = _spread([batch.num_distilled for batch in batches], max_tokens)
    picked = _spread([len(pairs) for pairs in before], max_tokens)
    return [
        replace(batch, diagnosed=_diagnosed(own_rows, [pairs[i] for i in own_pairs]))
        for batch, own_rows, pairs, own_pairs in zip(batches, rows, before, picked, strict=True)
    ]


def _diagnosed(rows: list[int], before: list[tuple[int, int]]) -> DiagnosedTokens:
    return DiagnosedTokens(
        rows=torch.tensor(rows, dtype=torch.int64),
        student_before=torch.tensor([student for student, _ in before], dtype=torch.int64),
        teacher_before=torch.tensor([teacher for _, teacher in before], dtype=torch.int64),
    )


def _rows_before(batch: PackedBatch, starts: dict[str, int]) -> list[tuple[int, int]]:
    """The rows of student and teacher that predict each token before the span of a sample."""
    if batch.teacher is None:
        return []
    places = batch.sample_index.tolist()
    firsts = {place: index for index, place in reversed(list(enumerate(places)))}
    found: list[tuple[int, int]] = []
    for place, index in sorted(firsts.items()):
        start = starts.get(batch.rollout_ids[place], 0)
        if start:
            sides = (batch.student, batch.teacher)
            student, teacher = (_before(packed, index, start) for packed in sides)
            found += zip(student, teacher, strict=True)
    return found


def _before(packed: PackedSequences, index: int, count: int) -> list[int]:
    """The rows that predict the `count` tokens before distilled token `index`."""
    return packed.rows(int(packed.gather[index]))[-1 - count : -1]


def _spread(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """At most `limit` of the places in lists of these sizes, at even distances over all lists."""
    total = sum(sizes)
    count = min(limit, total)
    chosen = [place * total // count for place in range(count)]
    return [
        [place - low for place in chosen if low <= place < high]
        for low, high in pairwise(accumulate(sizes, initial=0))
    ]
