"""The learner's log-probabilities are the local engine's, whatever the config does to the logits.

A step on samples of the engine measures the difference (`loss/logprob_gap_max`).
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.model.head import head, logits
from rosd_fast.model.layouts import choose_layout
from rosd_fast.trainer.learner import Learner
from rosd_fast.types import GenerationRequest, SamplingParams, TrainSample
from tests.tiny import VOCAB, tiny_model

ORIGINAL = 24  # tokens, of which the sequences have more
LONG = {"max_position_embeddings": 96}


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return LONG | {
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": ORIGINAL,
            "factor": 4.0,
            **parameters,
        }
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "soft caps": (
        "Gemma2",
        {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 8},
    ),
    "a scale": ("Cohere", {"logit_scale": 0.3}),
    "a divisor": ("Granite", {"logits_scaling": 3.0}),
    "a bias": ("GPTJ", {"rotary_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "dropout": ("Llama", {"attention_dropout": 0.1}),
    "yarn": ("Llama", scaled("yarn")),
    "linear": ("Llama", scaled("linear")),
    "llama3": ("Llama", scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
}


def samples_of(model: Any) -> list[TrainSample]:
    """Samples of the local engine, some longer than `ORIGINAL`."""
    params = SamplingParams(max_new_tokens=20, stop_token_ids=(1,))
    g = torch.Generator().manual_seed(3)
    requests = [
        GenerationRequest(
            id=str(index),
            prompt_ids=tuple(torch.randint(2, VOCAB, (length,), generator=g).tolist()),
            params=params,
            n=2,
        )
        for index, length in enumerate((4, 11, 17))
    ]
    prompts = {request.id: request.prompt_ids for request in requests}
    return [
        TrainSample(
            rollout_id=f"{made.request_id}/{made.index}",
            problem_id=made.request_id,
            student_prompt_ids=prompts[made.request_id],
            teacher_prompt_ids=(7, *prompts[made.request_id]),
            completion_ids=made.completion_ids,
            logprobs=made.logprobs,
            start=0,
            end=len(made.completion_ids),
            weight=1.0,
        )
        for made in asyncio.run(LocalEngine(model).generate(requests))
    ]


def learner_of(model: Any) -> Learner:
    return Learner(model, Config.model_validate({"optim": {"lr": 1e-3, "warmup_steps": 0}}))


@pytest.mark.parametrize("name", CASES)
def test_engine_and_learner_agree(name: str) -> None:
    family, changes = CASES[name]
    model = tiny_model(family, torch.float32, **changes)
    layout = choose_layout(model)
    model.train()  # where dropout is active
    samples = samples_of(model)
    assert max(len(s.student_prompt_ids) + len(s.completion_ids) for s in samples) > ORIGINAL
    batches = pack(samples, max_tokens=200, padded=layout == "padded")
    metrics = learner_of(model).step(batches).metrics
    assert metrics["loss/logprob_gap_max"] < 1e-4


@pytest.mark.parametrize("name", ["soft caps", "a scale", "a divisor", "a bias"])
def test_the_heads_logits_are_the_models(name: str) -> None:
    family, changes = CASES[name]
    model = tiny_model(family, **changes)
    ids = torch.randint(2, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    torch.testing.assert_close(logits(output.hidden_states[-1], head(model)), output.logits)


def test_student_and_teacher_are_deterministic_under_dropout() -> None:
    model = tiny_model("Llama", torch.float32, attention_dropout=0.5).train()
    samples = samples_of(model)
    other = copy.deepcopy(model)
    first, second = (
        learner_of(each).step(pack(samples, max_tokens=200)).metrics for each in (model, other)
    )
    assert first == second and first["loss/divergence"] > 0
    assert not any(module.training for module in model.modules())
