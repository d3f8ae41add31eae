"""Free the memory of a model's parameters for a while.

The model stays what it is: names, shapes, dtypes, tied parameters and buffers are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def release_parameters(model: nn.Module) -> None:
    """Drop the values of all parameters, which are then on the meta device."""
    _replace(model, torch.device("meta"))


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Give all parameters memory on `device`, of any values."""
    _replace(model, device)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter is: in several modules if it is tied."""

    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]


def places(model: nn.Module) -> dict[str, Place]:
    """The places of a model's parameters, by their first names."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((module, name))
    return {name: Place(p, tuple(owners[id(p)])) for name, p in model.named_parameters()}


@contextmanager
def filled(of_model: Mapping[str, Place], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, some parameters of a model without memory have the given values.

    of_model: the model's `places`. values: by the first name of each parameter.
    """
    try:
        for name, value in values.items():
            given = nn.Parameter(value, requires_grad=False)
            for module, attribute in of_model[name].owners:
                setattr(module, attribute, given)
        yield
    finally:
        for name in values:
            for module, attribute in of_model[name].owners:
                setattr(module, attribute, of_model[name].parameter)


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
