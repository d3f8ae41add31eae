"""Which learning rate and weight decay each trained parameter gets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from rosd_fast.config import OptimConfig
from rosd_fast.config.arguments import listed
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import matching

OPTION = "optim.lr_scale"


def param_groups(
    masters: Mapping[str, Parameter], scales: Mapping[str, float], options: OptimConfig
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, one per pair of learning rate and weight decay.

    The key `lr_scale` of a group is the factor of its learning rate.

    masters: the weights to step, by name. scales: factors by name.
    """
    groups: defaultdict[tuple[float, float], list[Parameter]] = defaultdict(list)
    for name, master in masters.items():
        decays = options.decay == "all" or master.ndim >= 2
        groups[scales[name], options.weight_decay if decays else 0.0].append(master)
    return [
        {"params": params, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), params in groups.items()
    ]


def lr_scales(named: Sequence[tuple[str, Tensor]], text: str) -> dict[str, float]:
    """The factor of each parameter's learning rate, by name; 1 where no pattern matches.

    Raises UserError for a pattern that matches no trained parameter.

    named: the model's parameters by name; a tied parameter has several. text: the option
    `optim.lr_scale`.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    scales: dict[int, float] = {}
    for pattern, scale in parse_scales(text):
        for key in matching(trained, pattern, where=OPTION):
            scales[key] = scale
    return {name: scales.get(id(parameter), 1.0) for name, parameter in trained}


def parse_scales(text: str) -> list[tuple[str, float]]:
    """The pairs of pattern and factor in `optim.lr_scale`. Raises UserError for a wrong pair."""
    return [_parse_scale(part) for part in listed(text)]


def _parse_scale(part: str) -> tuple[str, float]:
    pattern, _, number = part.rpartition("=")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not (pattern.strip() and 0 < scale < math.inf):
        raise UserError(
            f"{part} is not a pattern and a positive factor",
            where=OPTION,
            fix="Write it as *.embed_tokens.*=0.1; optim.trainable leaves parameters out",
        )
    return pattern.strip(), scale
