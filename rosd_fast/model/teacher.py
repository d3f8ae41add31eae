"""The teacher: a copy of the student's initial weights, kept (`frozen`) or averaged (`ema`).

Where a server runs it, only its output head stays here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import TeacherConfig
from rosd_fast.model.attention import Head, head, hidden_states
from rosd_fast.types import PackedSequences


class Teacher:
    """Scores the student's tokens under the privileged prompt. No gradient ever flows into it.

    `ema` follows the student after each optimizer step: t <- (1 - rate) t + rate s. The average is
    kept in fp32 (fp64 for fp64 models): in bfloat16 most of a small step would be rounded away.
    """

    def __init__(self, model: PreTrainedModel, config: TeacherConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._head = head(self.model)
        self._parameters = dict(self.model.named_parameters())
        self._average = self._parameters
        if config.kind == "ema":
            # `.float()` copies low-precision parameters and leaves the others shared with the
            # model.
            self._average = {
                name: p if p.dtype == torch.float64 else p.detach().float()
                for name, p in self._parameters.items()
            }

    @torch.no_grad()
    def hidden_states(self, packed: PackedSequences) -> Tensor:
        """[T, H] after the final norm, without a graph."""
        return hidden_states(self.model, packed)

    @property
    def head(self) -> Head:
        """The teacher's own output head."""
        return self._head

    def keep_head_only(self) -> None:
        """Free all other weights; from here on states come from elsewhere."""
        del self.model
        self._parameters = self._average = {}

    @property
    def weights(self) -> dict[str, Tensor]:
        """All weights by their state-dict name, for an engine that writes reflections."""
        return self.model.state_dict()

    @torch.no_grad()
    def update(self, student: Mapping[str, Tensor]) -> None:
        """Follow the student after an optimizer step; `student` is keyed by parameter name."""
        if self.config.kind == "ema":
            for name, average in self._average.items():
                if name in student:
                    average.lerp_(student[name].detach().to(average.dtype), self.config.ema_rate)
            self._write_back()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resume needs, by parameter name; nothing where a server has the weights."""
        if self.config.where == "sglang":
            return {}
        return {name: average.detach() for name, average in self._average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state`. Raises KeyError or RuntimeError when it belongs to another model."""
        if self.config.where == "sglang":
            return
        for name, average in self._average.items():
            average.copy_(state[name])
        self._write_back()

    def _write_back(self) -> None:
        for name, average in self._average.items():
            if average.data_ptr() != self._parameters[name].data_ptr():
                self._parameters[name].copy_(average)
