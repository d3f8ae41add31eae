"""Statistics of rows from those of tiles, over all tiles and shards of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosd_kernels.vocabulary import Vocabulary


class RowStats(NamedTuple):
    """Statistics of one side's rows, [R] each."""

    lse: Tensor  # log sum exp of the scaled logits
    entropy: Tensor  # nats
    logprob: Tensor | None  # log-prob of the sampled token


def row_stats(
    lse: Tensor, entropy: Tensor, sampled: Tensor | None, vocabulary: Vocabulary
) -> RowStats:
    """Merge [R, T] log-sum-exps and entropies of tiles: `sum_t P_t (entropy_t - log P_t)`.

    `sampled` [R]: the token's scaled logit, 0 on the shards that do not have it.
    """
    of_row = vocabulary.logsumexp(torch.logsumexp(lse, -1) if lse.shape[1] > 1 else lse[:, 0])
    log_mass = lse - of_row[:, None]
    total = vocabulary.sum_((log_mass.exp() * (entropy - log_mass)).sum(-1))
    logprob = None if sampled is None else vocabulary.sum_(sampled) - of_row
    return RowStats(lse=of_row, entropy=total, logprob=logprob)
