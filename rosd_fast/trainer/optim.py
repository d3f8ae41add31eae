"""AdamW (arXiv 1711.05101) with a schedule, gradient clipping and fp32 master weights.

A parameter in lower precision gets an fp32 master: at a learning rate of 1e-5 a bfloat16 weight of
0.02 would not move at all, as its neighbours are 1e-4 away. Its gradient is summed in fp32 too.
With `optim.offload` every parameter has a master in host memory, beside its gradient and moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rosd_fast.config import OptimConfig
from rosd_fast.trainer.adamw import make_adamw, state_tensors, step_adamw
from rosd_fast.trainer.param_groups import lr_scales, param_groups
from rosd_fast.trainer.schedule import learning_rate
from rosd_fast.utils.distributed import full


class Optimizer:
    """Steps the trainable parameters.

    `step` is a collective if parameters are sharded over ranks (DTensor).

    config: the options of `[optim]`.
    horizon: number of updates of the run, which the schedule is stretched over.
    num_updates: updates so far, without skipped ones.
    parameters: the trainable parameters by name.
    masters: full-precision weights by name; the parameter itself if it is in full precision and
        stays on its device.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        config: OptimConfig,
        *,
        horizon: int,
    ) -> None:
        """named_parameters: also those that are not trained. A tied parameter may come under
        each of its names, which `optim.lr_scale` then matches.
        """
        self.config, self.horizon = config, horizon
        self.num_updates = 0
        named = list(named_parameters)
        first_names = {id(p): name for name, p in reversed(named)}
        self.parameters = {
            name: p for name, p in named if p.requires_grad and first_names[id(p)] == name
        }
        self.masters = {name: self._master(p) for name, p in self.parameters.items()}
        groups = param_groups(self.masters, lr_scales(named, config.lr_scale), config)
        self._adamw = make_adamw(groups, config)

    @property
    def lr(self) -> float:
        """Learning rate of the next update, without the factors of `optim.lr_scale`."""
        return learning_rate(self.num_updates, self.horizon, self.config)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def accumulate(self) -> None:
        """Add the gradients to those of separate masters; call it after each backward."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.to(master.device, master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def gradient_sum(self, parameter: Tensor) -> Tensor | None:
        """The float32 memory in which a trained parameter's gradients are summed until `step`.

        A caller may add to it beside `accumulate`. None where there is none on the parameter's
        device: not trained, offloaded, or sharded.
        """
        for name, own in self.parameters.items():
            master = self.masters[name]
            if own is parameter and type(master) is Parameter and master.is_contiguous():
                if master.device != own.device or master.dtype != torch.float32:
                    return None
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                return master.grad
        return None

    def step(self) -> float:
        """Clip the gradients and update; returns the gradient norm before clipping.

        If the norm is not finite, weights, moments and `num_updates` stay as they are.
        """
        gradients = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = get_total_norm(gradients)
        value = float(full(norm))
        if math.isfinite(value):
            clip_grads_with_norm_(self.masters.values(), self.config.grad_clip, norm)
            step_adamw(self._adamw, self.lr)
            self.num_updates += 1
            self._write_back()
        self.zero_grad()
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights in full precision, moments and numbers of updates, as a flat mapping."""
        state = {"num_updates": torch.tensor(self.num_updates)}
        for name, master in self.masters.items():
            state[f"master.{name}"] = master.detach()
            for key, value in state_tensors(self._adamw, master):
                state[f"{key}.{name}"] = value
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

    def _master(self, parameter: Parameter) -> Parameter:
        """The full-precision weight to step."""
        if is_full_precision(parameter) and not self.config.offload:
            return parameter
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        device = "cpu" if self.config.offload else parameter.device
        return Parameter(parameter.detach().to(device, dtype, copy=True))

    @torch.no_grad()
    def _write_back(self) -> None:
        """Round the masters into their parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def is_full_precision(parameter: Tensor) -> bool:
    """Whether the parameter can be stepped without a master."""
    return parameter.dtype in (torch.float32, torch.float64)
