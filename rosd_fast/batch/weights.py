"""Mini-batches of a step's samples, and the normalizer of the losses that need no teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rosd_fast.types import Group, TrainSample

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


def with_problem_weights(
    samples: Sequence[TrainSample], groups: Sequence[Group]
) -> list[TrainSample]:
    """Multiply each sample's weight by its problem's.

    What a loss is divided by does not depend on these weights.
    """
    weights = {group.problem.id: group.problem.weight for group in groups}
    return [
        replace(sample, weight=sample.weight * weights[sample.problem_id]) for sample in samples
    ]


def normalized(
    samples: Sequence[TrainSample],
    normalize: Normalize,
    *,
    max_new_tokens: int,
    entropy_bonus: bool = False,
) -> list[TrainSample]:
    """Divide the weights of the samples that need no teacher, and drop those without an effect.

    The policy gradient and the likelihood of an update are then sums over its tokens. What a token
    is divided by, for M tokens of B such samples:

        token      M
        sequence   B times the number of tokens of its own sample
        constant   B * max_new_tokens

    A sample of advantage 0 counts in M and B and is left out, since its gradient is zero, unless
    there is an entropy bonus. Distilled samples stay as they are.

    entropy_bonus: whether `policy.entropy_weight` is above 0.
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
        if sample.is_distilled or (sample.weight and (entropy_bonus or sample.advantage != 0))
    ]


def micro_batch_mean(
    samples: Sequence[TrainSample], rollout_ids: Sequence[str], size: int
) -> list[TrainSample]:
    """Weight the distilled samples so that every micro-batch counts the same: a known bug of ROSD's
    public code, which takes the mean of each micro-batch before that of all.

    The loss of an update is a sum divided by its N distilled tokens. With M micro-batches, a token
    of one that has n distilled tokens gets the weight N / (M n), so the loss becomes the mean over
    micro-batches of their means. A micro-batch without distilled tokens counts in M, as there.

    rollout_ids: of all rollouts of the step, in order, of which `size` after `size` are a
    micro-batch. The public code first reorders them by length, to balance its GPUs.
    """
    place = {rollout_id: index // size for index, rollout_id in enumerate(rollout_ids)}
    num_tokens = [0] * -(-len(rollout_ids) // size)
    for sample in samples:
        if sample.is_distilled:
            num_tokens[place[sample.rollout_id]] += sample.num_tokens
    total, count = sum(num_tokens), len(num_tokens)

    def weight(sample: TrainSample) -> float:
        return sample.weight * total / (count * num_tokens[place[sample.rollout_id]])

    return [
        replace(sample, weight=weight(sample)) if sample.is_distilled else sample
        for sample in samples
    ]
