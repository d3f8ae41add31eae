"""Linear layers that cannot have an adapter, which `lora.targets = "all-linear"` leaves out.

An adapter is a second way through a layer, beside its weight. It has no effect where something else
reads the weight, and it cannot be merged into a weight that several layers share.
"""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PreTrainedModel

READ_BY_SCAN = ("dt_proj", "out_proj")  # layers of a Mamba block


def without_adapter(model: PreTrainedModel) -> dict[str, str]:
    """The names of the linear layers that cannot have an adapter, each with the reason."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    owners = Counter(id(layer.weight) for layer in linear.values())
    modules = dict(model.named_modules())
    found = {}
    for name, layer in linear.items():
        parent, _, last = name.rpartition(".")
        owner = modules[parent]
        if any("Router" in type(each).__name__ for each in (layer, owner)):
            found[name] = "is a router of experts"
        elif last in READ_BY_SCAN and hasattr(owner, "A_log") and hasattr(owner, "D"):
            found[name] = "is read by the kernels of a Mamba block"
        elif owners[id(layer.weight)] > 1:
            found[name] = "has a weight that several layers share"
    return found
