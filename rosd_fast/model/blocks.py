"""Options for a model's blocks: activation checkpointing, liger-kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rosd_fast.config import LearnerConfig
from rosd_fast.errors import UserError
from rosd_fast.model.attention import backbone, name
from rosd_fast.model.flash import flash_attention
from rosd_fast.model.layouts import layout_of
from rosd_fast.model.nf4 import has_packed, num_weights

LAYOUT_NAMES = {
    "shared": "packed, prefixes shared",
    "packed": "packed, each sequence whole",
    "padded": "padded rows",
}


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers, in order."""
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def prepare_blocks(model: PreTrainedModel, config: LearnerConfig, device: torch.device) -> None:
    """Apply the options to the blocks, in place. Raises UserError if one cannot be applied."""
    if uses_liger(config, device):
        use_liger(model)
    for block in blocks(model):
        if config.activation_checkpointing:
            block.forward = partial(recomputed, block.forward)


def recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `forward`; its activations are recomputed in the backward pass instead of kept."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def uses_liger(config: LearnerConfig, device: torch.device) -> bool:
    """Whether liger-kernel's norms, rotations and MLPs are used.

    Raises UserError if the option asks for them and they cannot be used.
    """
    if config.liger == "off":
        return False
    missing = ""
    if device.type != "cuda":
        missing = "it needs a GPU"
    elif find_spec("liger_kernel") is None:
        missing = "liger-kernel is not installed"
    if missing and config.liger == "on":
        raise UserError(missing, where="learner.liger", fix="Leave it out")
    return not missing


def use_liger(model: PreTrainedModel) -> None:
    """Patch in liger-kernel's Triton kernels; a model type that it does not know stays as it is.

    liger-kernel: https://github.com/linkedin/Liger-Kernel
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    # Of an image-text model only the language model is left.
    several = model.config.get_text_config() is not model.config
    part = backbone(model) if several else model
    if part.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        # Its cross-entropy would replace the model's forward, and the loss here is another one.
        with suppress(ImportError):  # its code for the model may lag behind its table
            _apply_liger_kernel_to_instance(
                model=part, cross_entropy=False, fused_linear_cross_entropy=False
            )


def attention_name(model: PreTrainedModel, device: torch.device) -> str:
    """What computes attention: on padded rows the model's own choice."""
    if layout_of(model) == "padded":
        return model.config._attn_implementation or "eager"
    return (device.type == "cuda" and flash_attention()) or "sdpa"


def describe(
    model: PreTrainedModel,
    options: LearnerConfig,
    *,
    dtype: str,
    device: torch.device,
    num_ranks: int,
) -> str:
    """One line on how the learner computes, for the start of a run.

    "LlamaForCausalLM, 2,084,352 of 2,084,352 weights trained in float32, cpu, attention sdpa,
    packed, prefixes shared"
    """
    total = sum(num_weights(p) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = [
        name(model),
        f"{trained:,} of {total:,} weights trained in {dtype}",
        f"{num_ranks} ranks on {device.type}" if num_ranks > 1 else device.type,
        f"attention {attention_name(model, device)}",
        LAYOUT_NAMES[layout_of(model)],
    ]
    parts += ["liger kernels"] if uses_liger(options, device) else []
    parts += ["linear layers in 4 bits"] if has_packed(model) else []
    parts += ["activations recomputed"] if options.activation_checkpointing else []
    return ", ".join(parts)
