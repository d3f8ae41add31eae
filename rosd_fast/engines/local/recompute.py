"""Next-token logits without a cache: each row is read again as a whole at every token.

The way of models that cannot continue from what transformers caches of them, or not with rows of
unequal length. It needs nothing but a causal forward pass, which no token to the right of a row can
change, and takes a time that grows with the square of the length.

The rows' tokens lie in a `RowCache` in place of keys and values, so that rows join, part and retire
as with any other model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.engines.local.kv_cache import RowCache
from rosd_fast.engines.local.plain import plain_logits

PASS_TOKENS = 8192  # padded tokens of one forward pass, which bounds its memory


def recomputed_logits(
    model: PreTrainedModel, cache: RowCache, ids: Tensor, lengths: Tensor
) -> Tensor:
    """Add `ids` [B, L] to the rows of `cache`; return the logits [B, V] of the rows' ends.

    lengths: [B] int64, how many of the last columns of each row are its own, at least 1.
    """
    held = cache.write("ids", 0, ids[:, None, :, None])[:, 0, :, 0]
    cache.end += ids.shape[1]
    logits: list[Tensor] = []
    order = lengths.argsort(descending=True)
    for rows in _passes(lengths[order].tolist()):
        own = order[rows]
        length = lengths[own]
        column = torch.arange(int(length.max()), device=ids.device)
        place = held.shape[1] - length[:, None] + column
        tokens = held[own].gather(1, place.clamp_(max=held.shape[1] - 1))
        logits.append(plain_logits(model, tokens, last=length - 1))
    return torch.cat(logits)[order.argsort()]


def _passes(lengths: list[int]) -> list[slice]:
    """Cut rows, given their lengths from the longest on, into passes of PASS_TOKENS tokens."""
    passes, first = [], 0
    while first < len(lengths):
        stop = first + max(1, PASS_TOKENS // lengths[first])
        passes.append(slice(first, stop))
        first = stop
    return passes
