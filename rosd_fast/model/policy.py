"""A model as the trainer computes with it: `PolicyModel` on one process, `ShardedModel` on several.

Student and teacher are each one of these. What differs between a model in one piece and a model
that is sharded over the ranks (`rosd_fast.model.fsdp`) is behind the methods here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.model.head import Head, head
from rosd_fast.model.layouts import hidden_states
from rosd_fast.types import PackedSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyModel:
    """A transformers model and how to compute with it.

    module: the transformers model; the optimizer steps its parameters.
    device: the device that it computes on.
    offload: whether its weights are in host memory between uses.
    """

    module: PreTrainedModel
    device: torch.device
    offload: bool = False

    @property
    def head(self) -> Head:
        """The output head, or this rank's rows of it; read it between `hidden_states` and
        `release`."""
        return head(self.module)

    def hidden_states(self, packed: PackedSequences) -> Tensor:
        """The [T, H] states after the final norm; differentiable when grad mode is on.

        A collective if the model is sharded.
        """
        if self.offload:
            self.module.to(self.device)  # type: ignore[arg-type]
        return hidden_states(self.module, packed)

    def release(self) -> None:
        """Free the memory that `hidden_states` needed on the device beyond what is kept there."""
        if self.offload:
            self.module.to("cpu")  # type: ignore[arg-type]

    @torch.no_grad()
    def gather_weights(self, into: PreTrainedModel | None) -> None:
        """Write the full weights into another model; None on the ranks that have no such model.

        A collective if the model is sharded. Nothing is done if `into` is the model itself.
        """
        if into is not None and into is not self.module:
            targets = dict(into.named_parameters())
            for name, parameter in self.module.named_parameters():
                targets[name].copy_(parameter)
