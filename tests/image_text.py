"""Tiny random image-text models of several families, as the folders that people download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny import SHAPE

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
# By config class: (text config, vision config).
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma3": (
        SLIDING | {"query_pre_attn_scalar": 8},
        VISION | HEADS | {"image_size": 64, "vision_use_head": False},
    ),
    "Gemma4": (
        SLIDING
        | {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
        VISION | HEADS | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
    ),
    "Mistral3": (
        {"model_type": "mistral"},
        VISION | HEADS | {"head_dim": 8, "image_size": 56, "patch_size": 14},
    ),
    "Qwen3_5": (LINEAR, QWEN_VISION),
    "Qwen3VL": ({}, QWEN_VISION | {"deepstack_visual_indexes": [0]}),
    "Llama4": (
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 64},
        VISION
        | HEADS
        | {
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
}


def image_text_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> Any:
    """A model with a language model and a vision tower.

    text: changes to its text config. top: to the config itself.
    """
    shape, vision = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        text_config=SHAPE | shape | (text or {}), vision_config=vision, **top
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def save_image_text(folder: Path, family: str, tokenizer: Any, **options: Any) -> Any:
    """Save such a model, with a tokenizer and a processor's file; returns the model."""
    model = image_text_model(family, **options)
    model.save_pretrained(folder)
    use_hub_names(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 28}, indent=1))
    return model


def use_hub_names(folder: Path) -> None:
    """Name the weights of a SigLIP tower as the hub's files do.

    transformers reads these names, and writes them for a model that it has read them from.
    """
    file = folder / "model.safetensors"
    if "siglip" in (folder / "config.json").read_text():
        weights = load_file(file)
        named = {
            name.replace("vision_tower.", "vision_tower.vision_model."): weight
            for name, weight in weights.items()
        }
        save_file(named, file, {"format": "pt"})
