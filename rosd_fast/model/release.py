"""Free the memory of a model's parameters for a while.

The model stays what it is: names, shapes, dtypes, tied parameters and buffers are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def release_parameters(model: nn.Module) -> None:
    """Drop the values of all parameters, which are then on the meta device."""
    _replace(model, torch.device("meta"))


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Give all parameters memory on `device`, of any values."""
    _replace(model, device)


@contextmanager
def filled(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, some parameters of a model without memory have the given values.

    values: by the first name of each parameter.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((module, name))
    empty = {name: p for name, p in model.named_parameters() if name in values}
    try:
        for name, parameter in empty.items():
            given = nn.Parameter(values[name], requires_grad=False)
            for module, attribute in owners[id(parameter)]:
                setattr(module, attribute, given)
        yield
    finally:
        for parameter in empty.values():
            for module, attribute in owners[id(parameter)]:
                setattr(module, attribute, parameter)


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
