"""Statistics of rows from those of tiles, over all tiles and shards of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rosd_kernels.vocabulary import Vocabulary


class RowStats(NamedTuple):
    """Statistics of one side's rows, [R] each."""

    lse: Tensor  # log sum exp of the scaled logits
    entropy: Tensor  # nats
    logprob: Tensor | None  # log-prob of the sampled token

    @classmethod
    def joined(cls, parts: Sequence[RowStats]) -> RowStats:
        """The statistics of consecutive groups of rows."""
        if len(parts) == 1:
            return parts[0]
        lse, entropy, logprob = zip(*parts, strict=True)
        of_sampled = None if logprob[0] is None else torch.cat(logprob)
        return cls(torch.cat(lse), torch.cat(entropy), of_sampled)


def row_stats(
    lse: Tensor, entropy: Tensor, sampled: Tensor | None, vocabulary: Vocabulary
) -> RowStats:
    """Merge [R, T] log-sum-exps and entropies of tiles: `sum_t P_t (entropy_t - log P_t)`.

    `sampled` [R]: the token's scaled logit, 0 on the shards that do not have it.
    """
    of_row = vocabulary.logsumexp(torch.logsumexp(lse, -1) if lse.shape[1] > 1 else lse[:, 0])
    total = vocabulary.sum_(entropy_terms(entropy, lse - of_row[:, None]).sum(-1))
    logprob = None
    if sampled is not None:
        # The token's dot product may be summed in another sequence than its row's: 1e-5 above 0.
        logprob = (vocabulary.sum_(sampled) - of_row).clamp_(max=0)
    return RowStats(lse=of_row, entropy=total, logprob=logprob)


def entropy_terms(entropy: Tensor, log_mass: Tensor) -> Tensor:
    """`P (entropy - log P)` of tiles, for their log masses; 0 for a tile without mass."""
    mass = log_mass.exp()
    return (entropy - log_mass).mul_(mass).masked_fill_(~(mass > 0), 0)
