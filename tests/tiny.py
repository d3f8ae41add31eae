"""A tiny random model of any family, for tests that compare what it computes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from rosd_fast.config import Config
from rosd_fast.model.adapters import choose_trainable
from rosd_fast.model.attention import use_exact_attention

VOCAB = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def tiny_model(
    family: str = "Llama", dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any
) -> Any:
    """A model of transformers' `family`, with weights so large that attention is not uniform.

    changes: to its config, as in `SHAPE`.
    """
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    use_exact_attention(model)
    if model._can_set_experts_implementation():  # torch's grouped product knows no float64
        model.set_experts_implementation("eager")
    return model


def mark_trainable(model: Any, config: Config) -> None:
    """Choose the parameters that the options of a run would train."""
    choose_trainable(model, lora=config.lora, trainable=config.optim.trainable, seed=config.seed)
