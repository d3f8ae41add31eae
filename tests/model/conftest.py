"""Tiny random models of several families, and samples to teach them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from rosd_fast.model.attention import use_exact_attention
from rosd_fast.types import DistillSample

VOCAB = 64


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """make_model("Llama", dtype, seed=0, **config)"""

    def make(
        family: str = "Llama", dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any
    ) -> Any:
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
        }
        config = getattr(transformers, f"{family}Config")(**shape | changes)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
        use_exact_attention(model)
        return model

    return make


@pytest.fixture
def distill_samples() -> list[DistillSample]:
    """Two groups of two."""
    g = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=g).tolist())

    prompts = [(ids(6), ids(9)), (ids(4), ids(11))]
    return [
        DistillSample(
            rollout_id=f"{index // 2}/{index % 2}",
            student_prompt_ids=prompts[index // 2][0],
            teacher_prompt_ids=prompts[index // 2][1] + ids(3),
            completion_ids=ids(7 + index),
            logprobs=(-2.0,) * (7 + index),
            start=2,
            end=7 + index,
            weight=1.0 + index / 4,
        )
        for index in range(4)
    ]
