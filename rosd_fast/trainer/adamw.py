"""The AdamW that `optim.kind` names: torch's own, or torchao's with moments of 8 bits.

torchao stores a moment in blocks of 256 values: 8 bits per value and one scale per block
(arXiv 2110.02861). Parameters with fewer than 4096 values, or a number of values that is no
multiple of 256, keep fp32 moments.

torchao: https://github.com/pytorch/ao/tree/main/torchao/optim
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rosd_fast.config import OptimConfig
from rosd_fast.errors import UserError

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # AdamW's state, and whether it has signs


def check_adamw(options: OptimConfig, *, several_ranks: bool) -> None:
    """Raise UserError if the optimizer that the options name cannot be used here."""
    if options.kind != "adamw8bit":
        return
    where = "optim.kind = adamw8bit"
    if several_ranks:
        raise UserError(
            "runs on one process only",
            where=where,
            fix="Use adamw, whose moments FSDP shards over the ranks, or optim.offload",
        )
    if find_spec("torchao") is None:
        raise UserError("needs torchao", where=where, fix='pip install "rosd-fast[lowmem]"')


def make_adamw(groups: list[dict[str, Any]], options: OptimConfig) -> torch.optim.Optimizer:
    """AdamW on the groups, with all moments 0."""
    common: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.kind == "adamw":
        adamw: Any = torch.optim.AdamW(groups, **common, fused=True)
    else:
        from torchao.optim import AdamW8bit

        adamw = AdamW8bit(groups, **common)
    for group in adamw.param_groups:
        for parameter in group["params"]:  # early, so that every checkpoint has the moments
            adamw.state[parameter] = first_state(adamw, parameter)
    return adamw


def first_state(adamw: Any, parameter: Parameter) -> dict[str, Tensor]:
    """The state of a parameter before its first update."""
    if isinstance(adamw, torch.optim.AdamW):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, **{name: torch.zeros_like(parameter.detach()) for name in MOMENTS}}
    moments = {name: adamw._new_buffer(parameter, signed) for name, signed in MOMENTS.items()}
    return {"step": torch.zeros(()), **moments}


def step_adamw(adamw: torch.optim.Optimizer, lr: float) -> None:
    """Do an update at the learning rate `lr`, times each group's `lr_scale`."""
    torchao = False
    for group in adamw.param_groups:
        torchao = isinstance(group["lr"], Tensor)
        if torchao:
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
    on_cpu = all(p.device.type == "cpu" for group in adamw.param_groups for p in group["params"])
    # torchao compiles its update once per shape. On a CPU that takes seconds and a C++ compiler.
    eager = torch.compiler.set_stance("force_eager") if torchao and on_cpu else nullcontext()
    with eager:
        adamw.step()


def state_tensors(
    adamw: torch.optim.Optimizer, parameter: Parameter
) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold a parameter's state, by name; they share its memory."""
    for name, value in adamw.state[parameter].items():
        if hasattr(value, "codes"):  # 8 bits per value, and a scale per block
            yield f"{name}_codes", value.codes
            yield f"{name}_scale", value.scale
        else:
            yield name, value
