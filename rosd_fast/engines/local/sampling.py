"""Drawing tokens by inverse CDF from uniform numbers that belong to a completion, not to a batch.

Completion `index` of a request draws its i-th token with the i-th number of a stream keyed by
(seed, request id, index). What else is decoded beside it, in which order and in how many waves,
cannot change its tokens, but for the rounding of batched matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from rosd_fast.types import SamplingParams


def uniforms(*, seed: int, request_id: str, index: int, count: int) -> np.ndarray:
    """The first `count` numbers of the stream: float32, multiples of 2^-24 in [0, 1).

    Philox's raw output is fixed for all numpy versions, unlike the methods of numpy's Generator.
    """
    key = blake2b(f"{seed}/{index}/{request_id}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


@dataclass(slots=True)
class Policy:
    """How each of B rows draws: `SamplingParams` as tensors, None for what no row asks for."""

    temperature: Tensor | None  # [B, 1] float32, 1 for greedy rows
    top_p: Tensor | None  # [B, 1] float32, 2 where off: cumulated rounding may reach 1 early
    top_k: Tensor | None  # [B, 1] int64, the vocabulary's size where off
    greedy: Tensor | None  # [B] bool

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], *, vocab: int, device: torch.device) -> Policy:
        """The policy of rows with these parameters. A greedy row ignores top_p and top_k."""

        def column(values: Sequence[float], off: float, dtype: torch.dtype) -> Tensor | None:
            if all(value == off for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        greedy = [params.temperature == 0 for params in rows]
        sampled = [None if params.temperature == 0 else params for params in rows]
        top_k = [min(p.top_k, vocab) if p and p.top_k else vocab for p in sampled]
        return cls(
            temperature=column([p.temperature if p else 1.0 for p in sampled], 1.0, torch.float32),
            top_p=column(
                [p.top_p if p and p.top_p < 1 else 2.0 for p in sampled], 2.0, torch.float32
            ),
            top_k=column(top_k, vocab, torch.int64),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
        )

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities [B, V] that tokens are drawn with: 0 for those that are cut off."""
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_p is not None or self.top_k is not None:
            logits = logits.masked_fill(~self._kept(logits), -torch.inf)
        return logits.softmax(-1)

    def _kept(self, logits: Tensor) -> Tensor:
        """What top-k and then top-p leave, [B, V] bool; of equals the lower id comes first."""
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k is not None:
            kept = torch.arange(ordered.shape[-1], device=ordered.device) < self.top_k
            ordered = ordered.masked_fill(~kept, -torch.inf)
        if self.top_p is not None:
            probs = ordered.softmax(-1)
            kept = kept & (probs.cumsum(-1) - probs < self.top_p)  # the mass before a token
        return torch.zeros_like(kept).scatter_(-1, ids, kept)


def draw(logits: Tensor, uniform: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Token ids [B] int64 and their log-probabilities [B] float32.

    logits: [B, V]. uniform: [B] float32 in [0, 1). A sampled token's log-probability is the one
    under the distribution it was drawn from (after temperature, top-k, top-p); a greedy token's is
    the one at temperature 1, as that of its own distribution is always 0. NaN and +inf give a NaN.
    """
    probs = policy.probs(logits.float())
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    # Below the total, so that rounding cannot choose a token without probability at the end.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(total.new_zeros(())))
    ids = torch.searchsorted(mass, target, right=True).clamp_(max=logits.shape[-1] - 1)
    if policy.greedy is not None:
        ids = torch.where(policy.greedy[:, None], logits.argmax(-1, keepdim=True), ids)
    return ids[:, 0], probs.gather(-1, ids)[:, 0].log()
