"""Linear layers that cannot have an adapter, which `lora.targets = "all-linear"` leaves out.

An adapter is a second way through a layer, beside its weight. It has no effect where something else
reads the weight, and it cannot be merged into a weight that several layers share.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedModel

CHOOSING = ("Router", "Indexer")  # in names of classes
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
        if any(word in type(each).__name__ for word in CHOOSING for each in (layer, owner)):
            found[name] = "chooses experts or tokens"
        elif not gives_features(layer):
            found[name] = "is not a plain linear layer"
        elif last in READ_BY_SCAN and hasattr(owner, "A_log") and hasattr(owner, "D"):
            found[name] = "is read by the kernels of a Mamba block"
        elif owners[id(layer.weight)] > 1:
            found[name] = "has a weight that several layers share"
    return found


@torch.no_grad()
def gives_features(layer: nn.Linear) -> bool:
    """Whether the layer, which may have a forward of its own, maps in_features to out_features."""
    if type(layer).forward is nn.Linear.forward:
        return True
    try:
        result = layer(layer.weight.new_zeros(1, 1, layer.in_features))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, 1, layer.out_features)
