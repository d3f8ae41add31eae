"""Rows of a head without a token: no probability, no gradient."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.model.load import load_model
from rosd_fast.model.token_rows import limit_rows, padding_mass, token_rows
from rosd_fast.trainer.learner import Learner
from rosd_fast.types import GenerationRequest, SamplingParams, TrainSample

EXTRA = 60


@pytest.fixture
def padded(tiny_llama: Any, tokenizer: Any) -> Any:
    """A random model with more rows than tokens, whose rows are as likely as others."""
    model = tiny_llama(vocab_size=len(tokenizer) + EXTRA)
    limit_rows(model, tokenizer)
    return model


def samples_of(model: Any) -> list[TrainSample]:
    request = GenerationRequest(
        id="r",
        prompt_ids=(5, 6, 7),
        params=SamplingParams(max_new_tokens=24, stop_token_ids=(1,)),
        n=12,
    )
    return [
        TrainSample(
            rollout_id=str(made.index),
            problem_id="r",
            student_prompt_ids=request.prompt_ids,
            teacher_prompt_ids=(9, *request.prompt_ids),
            completion_ids=made.completion_ids,
            logprobs=made.logprobs,
            start=0,
            end=len(made.completion_ids),
            weight=1.0,
        )
        for made in asyncio.run(LocalEngine(model).generate([request]))
    ]


def learner_of(model: Any, **engine: Any) -> Learner:
    return Learner(
        model, Config.model_validate({"optim": {"lr": 1e-2, "weight_decay": 0.0}, "engine": engine})
    )


def test_they_are_never_sampled(padded: Any, tokenizer: Any) -> None:
    assert padding_mass(padded, tokenizer, len(tokenizer)) > 0.05
    assert token_rows(padded) == token_rows(copy.deepcopy(padded)) == len(tokenizer)
    assert all(max(s.completion_ids) < len(tokenizer) for s in samples_of(padded))


def test_they_have_no_part_in_the_loss_and_no_gradient(padded: Any, tokenizer: Any) -> None:
    samples = samples_of(padded)
    before = padded.lm_head.weight.detach().clone()
    metrics = learner_of(padded).step(pack(samples, max_tokens=10_000)).metrics
    assert metrics["loss/logprob_gap_max"] < 1e-4 and metrics["loss/divergence"] > 0
    changed = (padded.lm_head.weight != before).any(-1)
    assert changed[: len(tokenizer)].any() and not changed[len(tokenizer) :].any()


def test_where_a_server_samples_from_them_they_are_trained(padded: Any, tokenizer: Any) -> None:
    assert learner_of(padded).vocab_size == len(tokenizer)
    assert learner_of(padded, kind="sglang").vocab_size == len(tokenizer) + EXTRA


def test_unlikely_rows_stay_in_the_head(tiny_llama: Any, tokenizer: Any) -> None:
    """As in trained models: a head of fewer rows would cost a copy of its gradient."""
    model = tiny_llama(vocab_size=len(tokenizer) + EXTRA)
    model.set_output_embeddings(torch.nn.Linear(32, len(tokenizer) + EXTRA))
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[len(tokenizer) :] = -30
    limit_rows(model, tokenizer)
    assert token_rows(model) == len(tokenizer) + EXTRA


def test_a_model_as_it_is_loaded(tmp_path: Path, tiny_llama: Any, tokenizer: Any) -> None:
    for rows, expected in ((EXTRA, len(tokenizer)), (0, len(tokenizer))):
        folder = tmp_path / str(rows)
        tiny_llama(vocab_size=len(tokenizer) + rows).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = load_model(str(folder), dtype="float32", device=torch.device("cpu"))
        assert token_rows(loaded.model) == expected


def test_a_vocabulary_with_fewer_rows_than_ids_is_refused(
    tmp_path: Path, tiny_llama: Any, tokenizer: Any
) -> None:
    rows = len(tokenizer) - 3
    tiny_llama(vocab_size=rows).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = rf"the tokenizer has ids up to {rows + 2}, but the model has only {rows} embeddings"
    with pytest.raises(UserError, match=found):
        load_model(str(tmp_path), dtype="float32", device=torch.device("cpu"))
