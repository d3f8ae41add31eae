"""AdamW (arXiv 1711.05101) with linear warm-up, gradient clipping and fp32 master weights.

Parameters below fp32 get an fp32 master: at a learning rate of 1e-5 a bfloat16 weight of 0.02 would
not move at all, as its neighbours are 1e-4 away. Their gradients are summed in fp32 too.
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

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's state of a parameter, besides its step


class Optimizer:
    """Steps the trainable ones of `named_parameters`. Weight decay applies to matrices only.

    Parameters may be spread over ranks (DTensor): `step` is a collective then.
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
        for master in self.masters.values():  # now: a checkpoint has them from the first step on
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master.detach()) for moment in MOMENTS},
            }

    @property
    def lr(self) -> float:
        """Learning rate of the next update: it rises over `warmup_steps` updates, then stays."""
        return self.config.lr * min(1.0, (self.num_updates + 1) / max(1, self.config.warmup_steps))

    def zero_grad(self) -> None:
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def accumulate(self) -> None:
        """Add low-precision gradients to their masters'; call it after each backward."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> float:
        """Clip, update, and return the gradient norm before clipping.

        A norm that is not finite changes nothing: neither weights, moments nor `num_updates`.
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
        """Trained weights in full precision, moments, numbers of updates: a flat mapping."""
        state = {"num_updates": torch.tensor(self.num_updates)}
        for name, master in self.masters.items():
            state[f"master.{name}"] = master.detach()
            for moment, value in self._adamw.state[master].items():
                state[f"{moment}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state`. Raises KeyError or RuntimeError when it belongs to another model."""
        own = self.state_dict()
        for name in own.keys() - {"num_updates"}:
            own[name].copy_(state[name])
        self.num_updates = int(state["num_updates"])
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def is_full_precision(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64)
