"""Free the memory of a model's parameters for a while.

The model stays what it is: names, shapes, dtypes, tied parameters and buffers are kept.
"""

from __future__ import annotations

import torch
from torch import nn


def release_parameters(model: nn.Module) -> None:
    """Drop the values of all parameters, which are then on the meta device."""
    _replace(model, torch.device("meta"))


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Give all parameters memory on `device`, of any values."""
    _replace(model, device)


def _replace(model: nn.Module, device: torch.device) -> None:
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device=device),
                    requires_grad=parameter.requires_grad,
                )
            setattr(module, name, replaced[id(parameter)])
