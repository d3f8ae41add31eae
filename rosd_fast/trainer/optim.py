"""AdamW (arXiv 1711.05101) with linear warm-up, gradient clipping and fp32 master weights.

A parameter in lower precision gets an fp32 master: at a learning rate of 1e-5 a bfloat16 weight of
0.02 would not move at all, as its neighbours are 1e-4 away. Its gradient is summed in fp32 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rosd_fast.config import OptimConfig
from rosd_fast.utils.distributed import full

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's state per parameter, besides its step


class Optimizer:
    """Steps the trainable parameters. Weight decay applies to matrices only.

    `step` is a collective if parameters are sharded over ranks (DTensor).

    config: the options of `[optim]`.
    num_updates: updates so far, without skipped ones.
    parameters: the trainable parameters by name.
    masters: full-precision weights by name; the parameter itself if it is in full precision.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig
    ) -> None:
        self.config = config
        self.num_updates = 0
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.masters = {
            name: p if is_full_precision(p) else Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        matrices = [p for p in self.masters.values() if p.ndim >= 2]
        vectors = [p for p in self.masters.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for master in self.masters.values():  # early, so that every checkpoint has the moments
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master.detach()) for moment in MOMENTS},
            }

    @property
    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up over `warmup_steps`, then constant."""
        return self.config.lr * min(1.0, (self.num_updates + 1) / max(1, self.config.warmup_steps))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def accumulate(self) -> None:
        """Add low-precision gradients to those of their masters; call it after each backward."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> float:
        """Clip the gradients and update; returns the gradient norm before clipping.

        If the norm is not finite, weights, moments and `num_updates` stay as they are.
        """
        gradients = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = get_total_norm(gradients)
        value = float(full(norm))
        if math.isfinite(value):
            clip_grads_with_norm_(self.masters.values(), self.config.grad_clip, norm)
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            self._adamw.step()
            self.num_updates += 1
            self._write_back()
        self.zero_grad()
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights in full precision, moments and numbers of updates, as a flat mapping."""
        state = {"num_updates": torch.tensor(self.num_updates)}
        for name, master in self.masters.items():
            state[f"master.{name}"] = master.detach()
            for moment, value in self._adamw.state[master].items():
                state[f"{moment}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into weights and moments.

        Raises KeyError or RuntimeError if it belongs to another model.
        """
        current = self.state_dict()
        for name in current.keys() - {"num_updates"}:
            current[name].copy_(state[name])
        self.num_updates = int(state["num_updates"])
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        """Round the masters into their parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def is_full_precision(parameter: Tensor) -> bool:
    """Whether the parameter can be stepped without a master."""
    return parameter.dtype in (torch.float32, torch.float64)
