"""Tiny random models, as folders in the layout of the hub, that a real SGLang serves on a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.image_text import SLIDING, use_hub_names

SHAPE: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
NO_BUFFER = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model to serve.

    config: transformers' config class, without "Config".
    text: changes to `SHAPE`.
    vision: the config of its vision tower; None: a text model.
    args: more arguments of sglang.launch_server.
    """

    config: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    args: tuple[str, ...] = ()


SERVED = {
    "Qwen3": Served(config="Qwen3"),
    "Qwen3-MoE": Served(config="Qwen3Moe", text=EXPERTS),
    "Mixtral": Served(config="Mixtral", text={"num_local_experts": 4}),
    "Gemma 3 (text)": Served(
        config="Gemma3Text", text=SLIDING | {"sliding_window": 16, "query_pre_attn_scalar": 32}
    ),
    "GPT-OSS": Served(
        config="GptOss",
        text=SLIDING
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "intermediate_size": 128,
        },
        args=("--attention-backend", "intel_amx"),
    ),
    "Qwen3-Next": Served(
        config="Qwen3Next",
        text=EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
        args=NO_BUFFER,
    ),
    "Gemma 3": Served(
        config="Gemma3",
        text=SLIDING | {"sliding_window": 16, "query_pre_attn_scalar": 32},
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "vision_use_head": False,
        },
    ),
}


def save_served(folder: Path, name: str, tokenizer: Any) -> None:
    """Save the model, its tokenizer and, for an image-text model, a processor's file."""
    served = SERVED[name]
    config_class = getattr(transformers, f"{served.config}Config")
    torch.manual_seed(0)
    if served.vision is None:
        config = config_class(**SHAPE | served.text)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        config = config_class(text_config=SHAPE | served.text, vision_config=served.vision)
        model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    use_hub_names(folder)
    tokenizer.save_pretrained(folder)
    if served.vision is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": 64}))
