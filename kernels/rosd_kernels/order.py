"""The order in which the vocabulary is cut into tiles: likely entries share tiles.

In natural order nearly every tile holds some likely entry. Ordered by mean probability, a few tiles
hold the mass of peaked distributions, and `sparsity` can drop more. The order is an index into the
head's rows; no head is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rosd_kernels.logits import LogitTransform, transform_

COLUMNS_AT_ONCE = 4096  # entries of the vocabulary whose logits are in memory
ROWS_AT_ONCE = 256  # tokens per call; more of them add little


class VocabularyOrder:
    """Entries of the vocabulary by falling mean probability, learned from the first tokens.

    Pass the same one to `entry` or `mass` at every call. It observes until it has seen
    `num_tokens` tokens (student's and teacher's together) and is fixed from then on. With a sharded
    vocabulary each rank has its own, for its shard.

    Args:
        vocab_size: V, the head's rows (of this rank's shard).
        num_tokens: tokens to learn from.
    """

    def __init__(self, vocab_size: int, num_tokens: int = 1024) -> None:
        if vocab_size < 1 or num_tokens < 1:
            raise ValueError(
                f"VocabularyOrder: got vocab_size {vocab_size} and num_tokens {num_tokens}, "
                "want both >= 1"
            )
        self.vocab_size = vocab_size
        self.num_tokens = num_tokens
        self.num_seen = 0
        self.mass = torch.zeros(vocab_size, dtype=torch.float64)  # sum of probabilities seen
        self.permutation: Tensor | None = None  # [V] int64, None while it still learns

    def observe(
        self,
        hidden: Tensor,  # [N, H]
        head: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        lse: Tensor,  # [N] log sum exp of the scaled logits, of the whole vocabulary
        *,
        softcap: float | None,
        temperature: float,
    ) -> None:
        """Add the probabilities of up to 256 tokens, evenly spaced in `hidden`."""
        if self.permutation is not None or hidden.shape[0] == 0:
            return
        rows = hidden[:: -(-hidden.shape[0] // ROWS_AT_ONCE)].to(lse.dtype)
        lse = lse[:: -(-hidden.shape[0] // ROWS_AT_ONCE), None]
        mass = self.mass = self.mass.to(hidden.device)
        transform = LogitTransform(bias, softcap, temperature)
        for start in range(0, self.vocab_size, COLUMNS_AT_ONCE):
            columns = slice(start, min(start + COLUMNS_AT_ONCE, self.vocab_size))
            logits = rows @ head[columns].to(lse.dtype).T
            transform_(logits, transform.at(columns))
            mass[columns] += logits.sub_(lse).exp_().sum(0)
        self.num_seen += rows.shape[0]

    def settle(self) -> None:
        """Fix the order once enough tokens have been seen."""
        if self.permutation is None and self.num_seen >= self.num_tokens:
            self.permutation = self.mass.argsort(descending=True, stable=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that `load_state_dict` restores."""
        return {"mass": self.mass.cpu(), "num_seen": torch.tensor(self.num_seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state. Raises ValueError where it belongs to another vocabulary."""
        if state["mass"].shape != (self.vocab_size,):
            raise ValueError(
                f"mass: got shape {list(state['mass'].shape)}, want [V] = [{self.vocab_size}]"
            )
        self.mass, self.num_seen = state["mass"].double().clone(), int(state["num_seen"])
        self.permutation = None
        self.settle()


def positions(columns: Tensor | None, permutation: Tensor | None) -> Tensor | None:
    """Positions of the head's rows `columns` (-1: none) in the vocabulary's order."""
    if columns is None or permutation is None:
        return columns
    places = torch.empty_like(permutation)
    places[permutation] = torch.arange(len(permutation), device=permutation.device)
    return torch.where(columns >= 0, places[columns.clamp(min=0)], -1)
