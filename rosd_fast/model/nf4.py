"""Linear layers with weights of 4 bits (NF4), below adapters: QLoRA (arXiv 2305.14314).

bitsandbytes packs two weights into a byte and keeps a scale per 64 of them, 4.5 bits per weight. It
dequantizes a layer whenever it is computed, so the adapters' gradients are those of the quantized
model. What is exported, or handed to a server, is that model: its dequantized weights, with the
adapters merged in. Embeddings, norms, the output head and fused experts keep their dtype.

bitsandbytes: https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rosd_fast.config import LoraConfig
from rosd_fast.errors import UserError
from rosd_fast.model.adapter_targets import without_adapter
from rosd_fast.model.head import output_layer

BYTES_PER_WEIGHT = 0.5 + 4 / 64  # 4 bits, and a scale in fp32 per 64 weights


def check_quantize(lora: LoraConfig, *, several_ranks: bool) -> None:
    """Raise UserError where `lora.quantize` is set and cannot be had."""
    if lora.quantize == "none":
        return
    where = f"lora.quantize: {lora.quantize}"
    if several_ranks:
        raise UserError(
            "packed weights cannot be sharded over several ranks",
            where=where,
            fix="Train on one GPU, or leave it out",
        )
    if find_spec("bitsandbytes") is None:
        raise UserError("needs bitsandbytes", where=where, fix='pip install "rosd-fast[qlora]"')


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The layers whose weights are quantized: every linear layer but the output head, adapters, and
    those whose weight something else reads."""
    left_out = {*without_adapter(model)}
    head = output_layer(model)
    for name, module in model.named_modules():
        own = name.removesuffix(".base_layer")
        suits = own not in left_out and "lora_" not in name and module is not head
        if suits and type(module) is nn.Linear:
            yield name, module


def quantize_linear(model: PreTrainedModel, device: torch.device) -> None:
    """Replace the linear layers by quantized ones on `device`, in place, one after the other.

    The other parameters stay where they are. Layers compute in the dtype of their weights.
    """
    layers = import_module("bitsandbytes.nn")
    for name, layer in list(linear_layers(model)):
        has_bias, dtype = layer.bias is not None, layer.weight.dtype
        with torch.device("meta"):
            packed: Any = layers.Linear4bit(
                layer.in_features, layer.out_features, bias=has_bias, compute_dtype=dtype
            )
        weight: Any = layers.Params4bit(
            layer.weight.detach(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
        )
        packed.weight = weight.to(device)  # quantizes
        packed.bias = layer.bias
        # On some CPUs it would repack the weights in inference, and round their scales.
        packed.support_avx512bf16_for_cpu = False
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, packed.train(layer.training))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  (peft reads it)


def has_packed(model: nn.Module) -> bool:
    """Whether the model has quantized layers."""
    return any(_state(parameter) is not None for parameter in model.parameters())


def num_weights(parameter: Tensor) -> int:
    """The number of weights of a parameter, of which a packed one has two per value."""
    state = _state(parameter)
    return parameter.numel() if state is None else state.shape.numel()


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with packed weights dequantized, and without their scales.

    Other tensors share the model's memory.
    """
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        if (packed := _state(parameter)) is not None:
            functional = import_module("bitsandbytes.functional")
            state = {key: t for key, t in state.items() if not key.startswith(f"{name}.")}
            state[name] = functional.dequantize_4bit(parameter.data, packed)
    return state


def _state(parameter: Tensor) -> Any:
    """bitsandbytes' record of how a parameter is packed; None: it is not."""
    return getattr(parameter, "quant_state", None)
