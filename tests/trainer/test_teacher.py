"""Each kind of teacher against its definition, from dense float64 logits per sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import adapters_off
from rosd_fast.model.head import logits
from rosd_fast.model.layouts import hidden_states
from rosd_fast.trainer.learner import Learner
from tests.tiny import mark_trainable


def config_of(**sections: Any) -> Config:
    loss = {"strategy": "reference", "divergence": "forward_kl"}
    return Config.model_validate({"loss": loss, "optim": {"lr": 1e-2}, **sections})


def dense(model: Any, samples: Any, prompt: str) -> torch.Tensor:
    """[N, V] logits at the distilled tokens, in the order of the samples."""
    rows = []
    for sample in samples:
        ids = torch.tensor([*getattr(sample, prompt), *sample.completion_ids])
        first = len(getattr(sample, prompt)) - 1
        rows.append(model(ids[None]).logits[0, first + sample.start : first + sample.end])
    return torch.cat(rows)


def move(model: Any) -> None:
    """Change the trained weights, as optimizer steps would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def scored(learner: Learner, samples: Any) -> torch.Tensor:
    """The teacher's [N, V] log-probabilities."""
    (batch,) = pack(samples, max_tokens=10_000, min_shared=2)
    assert batch.teacher is not None
    with learner.teacher.scoring(batch.teacher) as (states, head):
        assert not states.requires_grad
        return logits(states, head).log_softmax(-1)


@pytest.mark.parametrize("only", ["", "model.layers.*"], ids=["head trained", "head fixed"])
@pytest.mark.parametrize("family", ["Llama", "Granite", "Cohere"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trust_region_mixes_logits(make_model, distill_samples, tied, family, only) -> None:
    options = config_of(teacher={"kind": "trust_region", "mix": 0.3}, optim={"trainable": only})
    scale = {"logits_scaling": 3.0} if family == "Granite" else {}
    model = make_model(family, tie_word_embeddings=tied, **scale)
    mark_trainable(model, options)
    learner, initial = Learner(model, options), copy.deepcopy(model)
    move(model)
    own, live = (dense(m, distill_samples, "teacher_prompt_ids") for m in (initial, model))
    expected = (0.7 * own + 0.3 * live).log_softmax(-1)
    assert (own - live).abs().max() > 0.02
    torch.testing.assert_close(scored(learner, distill_samples), expected, rtol=0, atol=1e-9)


def test_live_is_the_student_itself(make_model, distill_samples) -> None:
    options = config_of(teacher={"kind": "live"})
    learner = Learner(make_model("Gemma2", sliding_window=4), options)
    move(learner.model)
    expected = dense(learner.model, distill_samples, "teacher_prompt_ids").log_softmax(-1)
    # Gemma2's own attention computes the softmax in fp32.
    torch.testing.assert_close(scored(learner, distill_samples), expected, rtol=0, atol=1e-5)
    assert learner.teacher.state_dict() == {}
    batches = pack(distill_samples, max_tokens=40, min_shared=2)
    metrics = learner.step(batches).metrics
    assert metrics["loss/divergence"] > 0 and metrics["loss/grad_norm"] > 0


@pytest.mark.parametrize("kind", ["frozen", "trust_region"])
def test_with_adapters_the_teacher_is_the_model_without_them(
    make_model, distill_samples, kind
) -> None:
    options = config_of(teacher={"kind": kind, "mix": 0.3}, lora={"rank": 3})
    model = make_model("Qwen3")
    initial = copy.deepcopy(model)
    mark_trainable(model, options)
    learner = Learner(model, options)
    assert learner.teacher.model is model
    move(model)
    own, live = (dense(m, distill_samples, "teacher_prompt_ids") for m in (initial, model))
    assert (own - live).abs().max() > 0.1
    mix = 0.3 if kind == "trust_region" else 0.0
    expected = ((1 - mix) * own + mix * live).log_softmax(-1)
    torch.testing.assert_close(scored(learner, distill_samples), expected, rtol=0, atol=1e-9)
    with adapters_off(model):
        torch.testing.assert_close(dense(model, distill_samples, "teacher_prompt_ids"), own)


def test_with_adapters_ema_averages_them(make_model, distill_samples) -> None:
    options = config_of(teacher={"kind": "ema", "ema_rate": 0.25}, lora={"rank": 3})
    model = make_model("Llama", torch.float32)
    mark_trainable(model, options)
    learner, average = Learner(model, options), copy.deepcopy(model)
    for _ in range(3):
        learner.step(pack(distill_samples, max_tokens=40, min_shared=2))
        with torch.no_grad():
            for (name, mean), value in zip(
                average.named_parameters(), model.parameters(), strict=True
            ):
                if "lora_" in name:
                    mean.lerp_(value, 0.25)
    expected = dense(average, distill_samples, "teacher_prompt_ids").log_softmax(-1)
    found = scored(learner, distill_samples)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    live = dense(model, distill_samples, "teacher_prompt_ids").log_softmax(-1)
    assert (live - expected).abs().max() > 1e-3  # and the student has its adapters back


def test_trust_region_is_refused_under_a_soft_cap(make_model) -> None:
    options = config_of(teacher={"kind": "trust_region"})
    with pytest.raises(UserError, match=r"teacher.kind: trust_region: logits under a soft cap"):
        Learner(make_model("Gemma2", final_logit_softcapping=3.0), options)


@pytest.mark.parametrize("kind", ["frozen", "ema", "trust_region"])
def test_offloading_changes_nothing(make_model, distill_samples, kind) -> None:
    results = []
    for offload in (False, True):
        options = config_of(teacher={"kind": kind, "offload": offload})
        learner = Learner(make_model(), options)
        batches = pack(distill_samples, max_tokens=40, min_shared=2)
        results.append([learner.step(batches).metrics for _ in range(2)])
    assert results[0] == results[1]


def test_scoring_leaves_the_student_unchanged(make_model, distill_samples) -> None:
    model = make_model("Llama", torch.float32)
    options = config_of(teacher={"kind": "ema"}, lora={"rank": 2})
    mark_trainable(model, options)
    learner = Learner(model, options)
    move(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    (batch,) = pack(distill_samples, max_tokens=10_000)
    assert batch.teacher is not None
    with torch.no_grad():
        states = hidden_states(model, batch.student)
        with learner.teacher.scoring(batch.teacher):
            pass
        assert torch.equal(hidden_states(model, batch.student), states)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
