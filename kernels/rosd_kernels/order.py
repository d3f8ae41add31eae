"""The order in which the vocabulary is cut into tiles: likely entries together.

In natural order nearly every tile holds some likely entry. Ordered by mean probability, the mass
of peaked distributions lies in few tiles, and `sparsity` has more to drop. The order is an index
into the head's rows; no head is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rosd_kernels.logits import LogitTransform, transform_

COLUMNS_AT_ONCE = 4096  # logits of a part of the vocabulary at a time
ROWS_AT_ONCE = 256  # tokens looked at in one call; more tell no more


class VocabularyOrder:
    """Entries of the vocabulary by falling mean probability, learned from the first tokens.

    Give one to `entry` or `mass`, the same at every call. It looks on until it has seen
    `num_tokens` tokens (of student and of teacher) and stays as it is from then on. With a sharded
    vocabulary each rank has its own, of its shard.

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
        """Add the probabilities of up to 256 tokens, evenly taken from `hidden`."""
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
        """Fix the order once enough tokens were seen."""
        if self.permutation is None and self.num_seen >= self.num_tokens:
            self.permutation = self.mass.argsort(descending=True, stable=True)

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on from here."""
        return {"mass": self.mass.cpu(), "num_seen": torch.tensor(self.num_seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state. Raises ValueError when it is of another vocabulary."""
        if state["mass"].shape != (self.vocab_size,):
            raise ValueError(
                f"mass: got shape {list(state['mass'].shape)}, want [V] = [{self.vocab_size}]"
            )
        self.mass, self.num_seen = state["mass"].double().clone(), int(state["num_seen"])
        self.permutation = None
        self.settle()
