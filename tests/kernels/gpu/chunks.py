"""Chunks of logits, and a group of shards that needs no second process."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rosd_kernels.vocabulary import Vocabulary


class OneRankGroup(Vocabulary):
    """A group of one rank, whose sums are complete already."""

    is_sharded = True

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def logsumexp(self, lse: Tensor) -> Tensor:
        return lse


def padded(logits: Tensor) -> Tensor:
    """A copy of [R, V] logits in rows that are wider than V, with NaN beyond it."""
    size = logits.shape[1]
    return torch.full((len(logits), size + 3), math.nan)[:, :size].copy_(logits)
