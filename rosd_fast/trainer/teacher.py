"""The teacher: the model that the run began with, as it is or on its way after the student.

    frozen        the initial weights
    ema           t <- (1 - rate) t + rate s, after each optimizer step
    live          the student's own weights
    trust_region  logits (1 - mix) z_frozen + mix z_live

A student with adapters needs no copy: without them, it is the model that the run began with. Where
a server runs the teacher, only its output head stays here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import TeacherConfig
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import adapters_off, has_adapters
from rosd_fast.model.attention import hidden_states
from rosd_fast.model.fsdp import collect, is_spread
from rosd_fast.model.head import Head, head, output_layer
from rosd_fast.trainer.optim import is_full
from rosd_fast.types import PackedSequences


class Teacher:
    """Scores the student's tokens under the privileged prompt. No gradient ever flows into it.

    model: a copy of the initial weights, None: the student's own module serves (kind live, or
    adapters); it may be spread over ranks, and computing is a collective then. The average of kind
    ema is kept in fp32 (fp64 for fp64 models): in bfloat16 most of a small step would be rounded
    away. Raises UserError for a model that the kind does not suit.
    """

    def __init__(
        self, student: PreTrainedModel, config: TeacherConfig, model: PreTrainedModel | None
    ) -> None:
        self.config = config
        self.student = student
        self.adapted = has_adapters(student)
        self.model = student if model is None else model.eval().requires_grad_(False)
        self._head: Head | None = None  # of a teacher on a server
        self._parameters: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        if config.kind == "trust_region" and head(student).softcap is not None:
            raise UserError(
                "logits under a soft cap cannot be interpolated",
                where="teacher.kind: trust_region",
                fix="Choose frozen, ema or live",
            )
        if config.kind == "ema":
            self._parameters = {
                name: p
                for name, p in self.model.named_parameters()
                if not self.adapted or "lora_" in name
            }
            self._average = {name: self._first_average(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def hidden_states(self, packed: PackedSequences) -> Tensor:
        """[T, H] after the final norm, without a graph: what `head` makes the logits of.

        [T, 2 H] for a trust region whose student's head is trained.
        """
        kind = self.config.kind
        with self._in_place():
            own = hidden_states(self.model, packed)
        if kind != "trust_region":
            return own
        live, mix = hidden_states(self.student, packed), self.config.mix
        if self._shares_head:
            return (1 - mix) * own + mix * live
        return torch.cat([(1 - mix) * own, mix * live], dim=1)

    @property
    def head(self) -> Head:
        """The teacher's own output head; read it after `hidden_states`, and before `release`."""
        if self._head is not None:
            return self._head
        own = head(self.model)
        if self.config.kind != "trust_region" or self._shares_head:
            return own
        live, mix = head(self.student), self.config.mix
        bias = None
        if own.bias is not None and live.bias is not None:
            bias = (1 - mix) * own.bias.detach() + mix * live.bias.detach()
        return Head(
            weight=torch.cat([own.weight.detach(), live.weight.detach()], dim=1),
            bias=bias,
            scale=own.scale,
        )

    def release(self) -> None:
        """Free what `hidden_states` and `head` needed."""
        if self.model is not self.student:
            if is_spread(self.model):
                self.model.reshard()
            elif self.config.offload:
                self.model.to("cpu")  # type: ignore[arg-type]

    def keep_head_only(self, own: Head | None = None) -> None:
        """Free all other weights; from here on states come from elsewhere.

        own: the head, None: the model's.
        """
        self._head = own or head(self.model)
        self.model = self.student

    @torch.no_grad()
    def update(self, student: Mapping[str, Tensor]) -> None:
        """Follow the student after an optimizer step; `student` is keyed by parameter name."""
        if self.config.kind == "ema":
            for name, average in self._average.items():
                if name in student:
                    average.lerp_(student[name].detach().to(average), self.config.ema_rate)
            self._write_back()

    def collect(self, into: PreTrainedModel | None) -> None:
        """Write the weights into a whole copy, on the rank that gives one. A collective."""
        collect(self.model, into)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resume needs, by parameter name; nothing of what never changes."""
        return {name: average.detach() for name, average in self._average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state`. Raises KeyError or RuntimeError when it belongs to another model."""
        for name, average in self._average.items():
            average.copy_(state[name])
        self._write_back()

    @property
    def _shares_head(self) -> bool:
        """Whether the student's head stays what it was, so that states may be mixed instead."""
        return not output_layer(self.student).weight.requires_grad

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """`self.model` computes as the teacher, on the student's device."""
        if self.model is not self.student or self.config.kind == "live":
            if self.config.offload and not is_spread(self.model):
                self.model.to(self.student.device)  # type: ignore[arg-type]
            yield
        elif self.config.kind == "ema":
            before = {name: p.detach().clone() for name, p in self._parameters.items()}
            copy_all(self._average, self._parameters)
            try:
                yield
            finally:
                copy_all(before, self._parameters)
        else:
            with adapters_off(self.student):
                yield

    def _first_average(self, parameter: Tensor) -> Tensor:
        """A wide copy, or the parameter itself where it is wide and the teacher's own."""
        if self.adapted:
            return parameter.detach().clone()
        if is_full(parameter):
            return parameter
        return parameter.detach().float().to("cpu" if self.config.offload else parameter.device)

    def _write_back(self) -> None:
        """The averages into the teacher's own copy, where they are not one and the same."""
        if self.adapted:
            return
        for name, average in self._average.items():
            if average is not self._parameters[name]:
                self._parameters[name].copy_(average)


def needs_copy(student: PreTrainedModel, config: TeacherConfig) -> bool:
    """Whether the teacher is a second set of weights."""
    return config.kind != "live" and not has_adapters(student)


def copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
