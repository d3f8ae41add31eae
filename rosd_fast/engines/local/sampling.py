"""Drawing tokens by inverse CDF from uniform numbers that belong to a completion, not to a batch.

Completion `index` of a request draws its i-th token with the i-th number of a stream keyed by
(seed, request id, index). What else is decoded in the batch, in which order and in how many waves,
cannot change its tokens, except for the rounding of batched matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from rosd_fast.types import SamplingParams


def uniforms(*, seed: int, request_id: str, index: int, count: int) -> np.ndarray:
    """The first `count` numbers of the stream: float32, multiples of 2^-24 in [0, 1).

    The generator is Philox 4x64-10 (Salmon et al. 2011, doi.org/10.1145/2063384.2063405), whose raw
    output is the same in all numpy versions, unlike that of the methods of numpy's Generator
    (numpy.org/doc/stable/reference/random/bit_generators/philox.html).
    """
    key = blake2b(f"{seed}/{index}/{request_id}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


@dataclass(slots=True)
class Policy:
    """The sampling parameters of B rows as tensors; None for a filter that no row uses."""

    temperature: Tensor | None  # [B, 1] float32, 1 for greedy rows
    top_p: Tensor | None  # [B, 1] float32, 2 where off: cumulated rounding may reach 1 early
    top_k: Tensor | None  # [B, 1] int64, the vocabulary's size where off
    greedy: Tensor | None  # [B] bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], *, vocab: int, device: torch.device) -> Policy:
        """The policy of rows with these parameters. A greedy row ignores top_p and top_k."""

        def column(values: Sequence[float], off: float, dtype: torch.dtype) -> Tensor | None:
            if all(value == off for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        greedy = [p.temperature == 0 for p in params]
        sampled = [None if p.temperature == 0 else p for p in params]
        top_k = [min(p.top_k, vocab) if p and p.top_k else vocab for p in sampled]
        return cls(
            temperature=column([p.temperature if p else 1.0 for p in sampled], 1.0, torch.float32),
            top_p=column(
                [p.top_p if p and p.top_p < 1 else 2.0 for p in sampled], 2.0, torch.float32
            ),
            top_k=column(top_k, vocab, torch.int64),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
        )

    def with_copies(self, rows: Tensor) -> Policy:
        """The policy of these rows and behind them copies of the rows `rows` ([K] int64)."""
        columns = (getattr(self, field.name) for field in fields(self))
        return Policy(*(None if c is None else torch.cat([c, c[rows]]) for c in columns))

    def probs(self, logits: Tensor) -> Tensor:
        """The probabilities [B, V] of drawing each token: 0 for tokens that are filtered out."""
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_p is not None or self.top_k is not None:
            logits = logits.masked_fill(~self._kept(logits), -torch.inf)
        return logits.softmax(-1)

    def _kept(self, logits: Tensor) -> Tensor:
        """[B, V] bool: the tokens that top-k and then top-p keep. Ties go to the lower id."""
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k is not None:
            kept = torch.arange(ordered.shape[-1], device=ordered.device) < self.top_k
            ordered = ordered.masked_fill(~kept, -torch.inf)
        if self.top_p is not None:
            probs = ordered.softmax(-1)
            kept = kept & (probs.cumsum(-1) - probs < self.top_p)  # mass before the token
        return torch.zeros_like(kept).scatter_(-1, ids, kept)


def draw(
    logits: Tensor, uniform: Tensor, policy: Policy, row_of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw token ids [N] int64 and return them with their log-probabilities [N] float32.

    logits: [B, V]. uniform: [N] float32 in [0, 1). policy: of the B rows. row_of: [N] int64, the
    row of the logits that each is drawn from; None: the rows in order. A sampled token's
    log-probability is that of the distribution it was drawn from (after temperature, top-k, top-p).
    A greedy token's is that at temperature 1, since its own distribution would always give 0.
    Logits of NaN or +inf give NaN.
    """
    probs = policy.probs(logits.float())
    greedy = policy.greedy
    best = None if greedy is None else logits.argmax(-1, keepdim=True)
    if row_of is not None:
        probs = probs[row_of]
        if greedy is not None and best is not None:
            greedy, best = greedy[row_of], best[row_of]
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    # Below the total, so that rounding cannot pick a zero-probability token at the end.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(total.new_zeros(())))
    ids = torch.searchsorted(mass, target, right=True).clamp_(max=logits.shape[-1] - 1)
    if greedy is not None and best is not None:
        ids = torch.where(greedy[:, None], best, ids)
    return ids[:, 0], probs.gather(-1, ids)[:, 0].log()
