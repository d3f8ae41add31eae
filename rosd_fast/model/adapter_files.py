"""Adapters in peft's layout: `adapter_config.json` and `adapter_model.safetensors`.

peft.PeftModel.from_pretrained(base_model, folder)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

NAME = "default"  # peft's name of the only adapter; files leave it out
PREFIX = "base_model.model."  # of every name in a file, after the classes of peft's models


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' weights, by the names that peft gives them in files.

    Tensors share the model's memory. Empty for a model without adapters.
    """
    return {
        PREFIX + name.replace(f".{NAME}", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }


def adapter_config(model: PreTrainedModel) -> Any:
    """The peft.LoraConfig to write beside the weights, for a causal language model."""
    config: Any = copy.copy(model.peft_config[NAME])  # type: ignore[index]
    config.inference_mode = True
    config.task_type = "CAUSAL_LM"
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set has another order each time
    return config


def write_adapter(config: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter to a folder. Raises OSError or SafetensorError."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
