"""A model folder for `teacher.model`: the quickstart's tokenizer, and a model of another shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rosd_fast.quickstart import MODEL_DIR


def save_teacher(folder: Path, *, rows: int = 0, seed: int = 1, **config: Any) -> str:
    """A random teacher with the quickstart's tokenizer; rows: more than the quickstart has."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": json.loads((MODEL_DIR / "config.json").read_text())["vocab_size"] + rows,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**shape | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
