"""Attention by PyTorch's scaled_dot_product_attention, for what a layer may ask of its scores.

An attention sink s of a head is one more score, without a key and a value (GPT-OSS):

    o_i = sum_j exp(q_i k_j) v_j / (exp(s) + sum_j exp(q_i k_j))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 2**26  # elements of a mask or of scores that are held at once
MIN_BLOCK = 128  # queries of a sliding layer whose scores are held


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a layer attends.

    scale: of the scores; None: the head size to the power of -1/2.
    dropout: probability of the weights.
    window: a token sees itself and the `window - 1` tokens before it; None: all before it.
    chunk: a token sees the tokens of its own chunk of so many, counted from the sequence's
        beginning; None: all.
    softcap: c of c tanh(score / c); None: no cap.
    sinks: [Hq] a score without a value for each head; None: no sinks.
    """

    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def first_key(self, query: int) -> int:
        """The first key that the query at this position sees."""
        first = 0 if self.window is None else max(0, query + 1 - self.window)
        return first if self.chunk is None else max(first, query // self.chunk * self.chunk)

    def visible(self, queries: range, keys: range, device: torch.device) -> Tensor | None:
        """[len(queries), len(keys)] bool, for positions in a sequence; None: each query sees all
        keys up to its own, which is the last for the last query."""
        first = self.first_key(queries[-1])
        if first <= keys.start and len(queries) == len(keys):
            return None
        own = torch.arange(queries.start, queries.stop, device=device)[:, None]
        other = torch.arange(keys.start, keys.stop, device=device)
        visible = other <= own
        if self.window is not None:
            visible &= other > own - self.window
        if self.chunk is not None:
            visible &= other // self.chunk == own // self.chunk
        return visible


def attend(
    query: Tensor,  # [1, Hq, L, D]
    key: Tensor,  # [1, Hk, M, D], M >= L
    value: Tensor,  # [1, Hk, M, Dv]
    rule: Rule,
) -> Tensor:
    """Attention for the last L of a sequence's M tokens: [1, Hq, L, Dv].

    Queries are taken in blocks where scores are held, so that their memory is bounded.
    """
    num_heads, length, before = query.shape[1], query.shape[2], key.shape[2] - query.shape[2]
    held = rule.softcap is not None or rule.sinks is not None
    size = max(1, MAX_SCORES // (num_heads * key.shape[2])) if held else length
    if rule.chunk is not None:
        size = min(size, rule.chunk)  # each block reads the keys of two chunks at most
    if held and rule.window is not None:
        size = min(size, max(rule.window, MIN_BLOCK))
    outputs = []
    for start in range(0, length, size):
        queries = range(before + start, before + min(start + size, length))
        keys = range(rule.first_key(queries.start), queries.stop)
        visible = rule.visible(queries, keys, query.device)
        q = query if len(queries) == length else query[:, :, start : start + size]
        k, v = key, value
        if len(keys) < key.shape[2]:
            k, v = (x[:, :, keys.start : keys.stop] for x in (key, value))
        outputs.append(_attend(q, k, v, visible, rule))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, rule: Rule
) -> Tensor:
    """Attention of L queries to M keys: [1, Hq, L, Dv].

    visible: [L, M] bool, or None: query i sees the keys up to i.
    """
    grouped, mask = query.shape[1] != key.shape[1], visible
    if rule.softcap is not None:
        return _attend_capped(query, key, value, visible, rule)
    if rule.sinks is not None:
        if visible is None:
            visible = causal(query.shape[2], query.device)
        # The column of the sinks: a key of zeros, whose score the mask makes s, and no value.
        scores = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -torch.inf)
        sinks = rule.sinks.to(query.dtype)[:, None, None].expand(-1, query.shape[2], 1)
        mask = torch.cat([scores.expand(len(sinks), -1, -1), sinks], dim=-1)[None]
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=mask is None,
        scale=rule.scale,
        enable_gqa=grouped,
    )


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, rule: Rule
) -> Tensor:
    """`_attend` with a soft cap, which SDPA does not have."""
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if visible is None:
        visible = causal(query.shape[2], query.device)
    scale = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    cap = rule.softcap
    assert cap is not None
    scores = cap * torch.tanh(query @ key.transpose(2, 3) * scale / cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    # The softmax is in at least fp32, as in transformers' eager attention.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        value.dtype
    )
    return F.dropout(weights, rule.dropout) @ value


def causal(length: int, device: torch.device) -> Tensor:
    """[length, length] bool: each token sees those up to itself."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
