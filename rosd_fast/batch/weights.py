"""Mini-batches of a step's samples, and the normalizer of the losses that need no teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rosd_fast.types import TrainSample

Normalize = Literal["token", "sequence", "constant"]


def mini_batches(samples: Sequence[TrainSample], count: int) -> list[list[TrainSample]]:
    """Split the samples into `count` mini-batches of whole problems, as even as whole problems are.

    Samples keep their order. With fewer problems than `count` there are as many mini-batches as
    problems; without samples there is one, an empty one.
    """
    problems = list(dict.fromkeys(sample.problem_id for sample in samples))
    count = max(1, min(count, len(problems)))
    place = {problem: index * count // len(problems) for index, problem in enumerate(problems)}
    parts: list[list[TrainSample]] = [[] for _ in range(count)]
    for sample in samples:
        parts[place[sample.problem_id]].append(sample)
    return parts


def normalized(
    samples: Sequence[TrainSample], normalize: Normalize, *, max_new_tokens: int
) -> list[TrainSample]:
    """Divide the weights of the samples that need no teacher, and drop those without an effect.

    The policy gradient and the likelihood of an update are then sums over its tokens. What a token
    is divided by, for M tokens of B such samples:

        token      M
        sequence   B times the number of tokens of its own sample
        constant   B * max_new_tokens

    A sample of advantage 0 counts in M and B and is left out, since its gradient is zero. Distilled
    samples stay as they are.
    """
    others = [sample for sample in samples if not sample.is_distilled]
    num_tokens = sum(sample.num_tokens for sample in others)

    def divisor(sample: TrainSample) -> int:
        if normalize == "token":
            return num_tokens
        length = sample.num_tokens if normalize == "sequence" else max_new_tokens
        return len(others) * length

    return [
        sample if sample.is_distilled else replace(sample, weight=sample.weight / divisor(sample))
        for sample in samples
        if sample.is_distilled or sample.has_effect
    ]
