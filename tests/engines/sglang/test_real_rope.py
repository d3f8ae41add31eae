"""A real SGLang server computes a model whose RoPE depends on the length as the trainer does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from rosd_fast.config import Config
from rosd_fast.engines.factory import open_served_engine
from rosd_fast.engines.weight_check import token_logprobs
from rosd_fast.model.load import load_model
from rosd_fast.model.rope import fix_rope
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.types import Generation, GenerationRequest, SamplingParams

pytestmark = pytest.mark.sglang
BORDER, LONGEST = 32, 96
CASES: dict[str, dict[str, Any]] = {
    "Phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.5 + 0.8 * i for i in range(8)],
        },
        "original_max_position_embeddings": BORDER,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    },
    "Llama": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("family", ["Phi3", pytest.param("Llama", marks=pytest.mark.slow)])
def test_logprobs_of_server_and_trainer(family: str, tmp_path: Path) -> None:
    """Sequences below, at and across the border, computed together."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        **CASES[family],
    )
    torch.manual_seed(0)
    made: Any = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype="float32", device=torch.device("cpu"))
    fix_rope(model.model, LONGEST, served=True)
    options = Config.model_validate(
        {
            "model": str(tmp_path / "model"),
            "dtype": "float32",
            "device": "cpu",
            "engine": {
                "kind": "sglang",
                "python": os.environ["ROSD_SGLANG_PYTHON"],
                "server_args": "--max-total-tokens 4096",
            },
        }
    )
    prompts = [tuple(range(3, 3 + length)) for length in (4, 24, 31, 32, 33, 60)]
    requests = [
        GenerationRequest(
            id=str(index),
            prompt_ids=prompt,
            params=SamplingParams(max_new_tokens=24, temperature=1.0, stop_token_ids=(1,)),
            n=2,
        )
        for index, prompt in enumerate(prompts)
    ]

    async def sample() -> list[Generation]:
        engine = open_served_engine(options, model, tmp_path, note=print)
        try:
            return await engine.generate(requests)
        finally:
            await engine.close()

    gaps = []
    for generation in asyncio.run(sample()):
        prompt = prompts[int(generation.request_id)]
        ours = token_logprobs(model.model, [*prompt, *generation.completion_ids])
        of_completion = ours[len(prompt) - 1 :]
        gaps += [abs(a - b) for a, b in zip(of_completion, generation.logprobs, strict=True)]
    assert max(gaps) < 1e-3
