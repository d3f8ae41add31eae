"""The shipped model has the figures that the loop needs, within noise."""

from __future__ import annotations

import asyncio

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosd_fast.quickstart import MODEL_DIR
from scripts.quickstart.figures import measure


def test_it_loads_like_any_other_model_and_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert model.config.model_type == "llama"
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    weights = MODEL_DIR / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, framework="pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118 - not a mapping
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ana is 34."}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids) == "<|user|>Ana is 34.<|end|><|assistant|>"
    assert "Ġis" in tokenizer.tokenize("Ana is 34.")  # words carry their leading space


@pytest.mark.slow
def test_figures() -> None:
    figures = asyncio.run(measure(str(MODEL_DIR), group_size=4))
    assert 0.35 <= figures["solve/dev"] <= 0.65
    assert figures["reflect/well_formed"] >= 0.80
    assert figures["teach/after"] - figures["teach/before"] >= 0.20
