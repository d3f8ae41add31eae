"""The teacher: the initial model, kept frozen or moved toward the student; or another model.

    frozen        the initial weights, or those of `teacher.model` (`separate_teacher`)
    ema           t <- (1 - rate) t + rate s, after each optimizer step
    live          the student's own weights
    trust_region  logits (1 - mix) z_frozen + mix z_live

A student with adapters needs no second copy of the weights: with its adapters off it is the initial
model. If a server runs the teacher, only the teacher's output head is kept here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import TeacherConfig
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import adapters_off, has_adapters
from rosd_fast.model.head import Head, output_layer
from rosd_fast.model.policy import PolicyModel
from rosd_fast.trainer.optim import is_full_precision
from rosd_fast.types import PackedSequences
from rosd_fast.utils.transfer import on_device


class Teacher:
    """Scores the student's tokens under the privileged prompt; no gradient ever flows into it.

    The average of kind ema is kept in fp32 (fp64 for fp64 models), because bfloat16 would round
    most of a small step away. Raises UserError for a model that the kind does not suit.

    student: the model that is trained.
    policy: the teacher's own weights; None: those of the student (kind live, or adapters).
    config: the options of `[teacher]`.
    adapted: whether the student has adapters.
    """

    def __init__(
        self, student: PolicyModel, config: TeacherConfig, policy: PolicyModel | None
    ) -> None:
        self.config = config
        self.student = student
        self.adapted = has_adapters(student.module)
        if policy is not None:
            policy.module.eval().requires_grad_(False)
        self.policy = policy or student
        self._server_head: Head | None = None  # set once a server computes the states
        self._parameters: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        if config.kind == "trust_region" and student.head.softcap is not None:
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

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model of `policy`."""
        return self.policy.module

    @contextmanager
    def scoring(
        self, packed: PackedSequences, server_states: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Head]]:
        """Yield the [N, Ht] states that predict the distilled tokens, without a graph, and a head.

        Both are [N, 2 H] and [V, 2 H] for a trust region whose student's head is trained. The head
        is valid within the block only; afterwards the memory for the teacher's weights is freed.

        server_states: [N, Ht] states that a teacher server has computed; None: compute them here.
        """
        try:
            if server_states is None:
                states = self._hidden_states(packed)
                head = self._head()
                yield states.index_select(0, on_device(packed.gather, states.device)), head
            else:
                head = self._head()
                states = on_device(server_states, head.weight.device)
                yield states.to(head.weight.dtype), head
        finally:
            if self.policy is not self.student:
                self.policy.release()

    def discard_model(self, head: Head | None = None) -> None:
        """Free all weights except the output head; from now on a server computes the states.

        head: a copy of the teacher's head; None: the model's own.
        """
        own, device = self.policy.head, self.student.device
        self._server_head = head or replace(
            own,
            weight=own.weight.detach().to(device),
            bias=None if own.bias is None else own.bias.detach().to(device),
        )
        self.policy = self.student

    @torch.no_grad()
    def update(self, student: Mapping[str, Tensor]) -> None:
        """Move the average toward the student after an optimizer step (kind ema).

        student: its weights in full precision, by parameter name.
        """
        if self.config.kind == "ema":
            for name, average in self._average.items():
                if name in student:
                    average.lerp_(student[name].detach().to(average), self.config.ema_rate)
            self._write_back()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name; weights that never change are not part of the state."""
        return {name: average.detach() for name, average in self._average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the averages.

        Raises KeyError or RuntimeError if it belongs to another model.
        """
        for name, average in self._average.items():
            average.copy_(state[name])
        self._write_back()

    @torch.no_grad()
    def _hidden_states(self, packed: PackedSequences) -> Tensor:
        """The [T, H] states after the final norm; [T, 2 H] for a trust region with two heads."""
        with self._teacher_weights():
            states = self.policy.hidden_states(packed)
        if self.config.kind != "trust_region":
            return states
        live, mix = self.student.hidden_states(packed), self.config.mix
        if self._shares_head:
            return (1 - mix) * states + mix * live
        return torch.cat([(1 - mix) * states, mix * live], dim=1)

    def _head(self) -> Head:
        """The output head for `_hidden_states`, valid until `policy.release`."""
        if self._server_head is not None:
            return self._server_head
        initial = self.policy.head
        if self.config.kind != "trust_region" or self._shares_head:
            return initial
        live, mix = self.student.head, self.config.mix
        bias = None
        if initial.bias is not None and live.bias is not None:
            bias = (1 - mix) * initial.bias.detach() + mix * live.bias.detach()
        return Head(
            weight=torch.cat([initial.weight.detach(), live.weight.detach()], dim=1),
            bias=bias,
            scale=initial.scale,
        )

    @property
    def _shares_head(self) -> bool:
        """Whether the student's head is not trained, so that states can be mixed instead of
        logits."""
        return not output_layer(self.student.module).weight.requires_grad

    @contextmanager
    def _teacher_weights(self) -> Iterator[None]:
        """Within the block, `self.policy` computes with the teacher's weights."""
        if self.policy is not self.student or self.config.kind == "live":
            yield
        elif self.config.kind == "ema":
            before = {name: p.detach().clone() for name, p in self._parameters.items()}
            copy_all(self._average, self._parameters)
            try:
                yield
            finally:
                copy_all(before, self._parameters)
        else:
            with adapters_off(self.student.module):
                yield

    def _first_average(self, parameter: Tensor) -> Tensor:
        """A full-precision copy, or the teacher's own parameter if that is in full precision."""
        if self.adapted:
            return parameter.detach().clone()
        if is_full_precision(parameter):
            return parameter
        return parameter.detach().float().to("cpu" if self.config.offload else parameter.device)

    def _write_back(self) -> None:
        """Round the averages into the parameters of the teacher's own copy."""
        if self.adapted:
            return
        for name, average in self._average.items():
            if average is not self._parameters[name]:
                self._parameters[name].copy_(average)


def needs_copy(student: PreTrainedModel, config: TeacherConfig) -> bool:
    """Whether the teacher is a second set of weights."""
    return config.kind != "live" and not has_adapters(student)


def copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy each tensor of `source` that `target` names into `target`."""
    for name, tensor in target.items():
        tensor.copy_(source[name])
