"""The agreement of student and teacher against full logits, and that measuring changes nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_fast.batch.diagnosed import with_diagnosed
from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.errors import RunFailed
from rosd_fast.model.head import Head, logits
from rosd_fast.trainer.agreement import topk_agreement
from rosd_fast.trainer.learner import Learner, LogprobGapTooLarge
from rosd_fast.types import PackedBatch, TrainSample


def make_config(**diagnose: Any) -> Config:
    return Config.model_validate(
        {"optim": {"lr": 1e-2, "warmup_steps": 0}, "diagnose": {"top_k": 4, **diagnose}}
    )


def packed(
    samples: list[TrainSample], *, max_tokens: int = 10**6, located: bool = True
) -> list[PackedBatch]:
    batches = pack(samples, max_tokens=40, min_shared=3)
    assert len(batches) > 1
    ids = {sample.rollout_id for sample in samples} if located else set()
    return with_diagnosed(batches, samples, located=ids, max_tokens=max_tokens)


def full_logprobs(model: Any, prompt: tuple[int, ...], sample: TrainSample) -> Tensor:
    """[completion, V] log-probabilities, by a plain forward pass of one sequence."""
    ids = torch.tensor([prompt + sample.completion_ids])
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_metrics_against_full_logits(make_model: Any, distill_samples: list[TrainSample]) -> None:
    model, teacher = (make_model("Llama", torch.float32, seed=seed) for seed in (0, 0))
    learner = Learner(model, make_config())
    with torch.no_grad():  # the student moves away from its teacher
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    overlap, student_mass, teacher_mass, before = [], [], [], []
    for sample in distill_samples:
        assert sample.teacher_prompt_ids is not None
        p_log = full_logprobs(model, sample.student_prompt_ids, sample)
        q_log = full_logprobs(teacher, sample.teacher_prompt_ids, sample)
        for p, q in zip(p_log[sample.start :], q_log[sample.start :], strict=True):
            mine, theirs = p.topk(4).indices.tolist(), q.topk(4).indices.tolist()
            overlap.append(len(set(mine) & set(theirs)) / 4)
            student_mass.append(float(p[mine].exp().sum()))
            teacher_mass.append(float(q[mine].exp().sum()))
        p, q = p_log[: sample.start].exp(), q_log[: sample.start].exp()
        mixed = ((p + q) / 2).log()
        before += (0.5 * (p * (p.log() - mixed) + q * (q.log() - mixed)).sum(-1)).tolist()
    metrics = learner.step(packed(distill_samples)).metrics
    expected = {
        "diag/topk_overlap": overlap,
        "diag/student_mass_topk": student_mass,
        "diag/teacher_mass_topk": teacher_mass,
        "diag/divergence_before": before,
    }
    found = {name: value for name, value in metrics.items() if name.startswith("diag/")}
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    assert found == pytest.approx(means, rel=1e-4)
    assert 0.2 < means["diag/topk_overlap"] < 0.95  # neither trivial nor random


def test_measuring_does_not_change_training(
    make_model: Any, distill_samples: list[TrainSample]
) -> None:
    weights = []
    for measured in (False, True):
        model = make_model("Llama", torch.float32, seed=0)
        learner = Learner(model, make_config())
        for _ in range(2):
            batches = packed(distill_samples)
            plain = pack(distill_samples, max_tokens=40, min_shared=3)
            result = learner.step(batches if measured else plain)
        assert ("diag/topk_overlap" in result.metrics) == measured
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_equal_models_agree_fully() -> None:
    g = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(30, 8, generator=g), bias=None, softcap=3.0, scale=0.5)
    states = torch.randn(7, 8, generator=g)
    options: dict[str, Any] = {"heads": (head, head), "temperature": 0.6, "workspace_mib": 1e-3}
    overlap, student_mass, teacher_mass = topk_agreement(states, states, k=5, **options)
    assert overlap.tolist() == [1.0] * 7
    expected = (logits(states, head) / 0.6).softmax(-1).topk(5).values.sum(-1)
    torch.testing.assert_close(student_mass, expected)
    torch.testing.assert_close(teacher_mass, expected)
    everything = topk_agreement(states, states.flip(0), k=1000, **options)
    assert all(torch.allclose(values, torch.ones(7)) for values in everything)
    assert all(not len(v) for v in topk_agreement(states[:0], states[:0], k=5, **options))


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_the_tokens_are_spread_over_the_update(
    distill_samples: list[TrainSample], limit: int
) -> None:
    batches = packed(distill_samples, max_tokens=limit)
    total = sum(batch.num_distilled for batch in batches)
    chosen, offset = [], 0
    for batch in batches:
        assert batch.diagnosed is not None
        chosen += (batch.diagnosed.rows + offset).tolist()
        offset += batch.num_distilled
    assert len(chosen) == min(limit, total)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert gaps <= {total // len(chosen), -(-total // len(chosen))}


def test_tokens_before_the_error_are_predicted_at_their_rows(
    distill_samples: list[TrainSample],
) -> None:
    completions = {sample.rollout_id: sample.completion_ids for sample in distill_samples}
    found = []
    for batch in packed(distill_samples):
        diagnosed = batch.diagnosed
        assert diagnosed is not None and batch.teacher is not None
        for packed_side, rows in (
            (batch.student, diagnosed.student_before),
            (batch.teacher, diagnosed.teacher_before),
        ):
            prompts = [packed_side.sequence(int(row)) for row in rows]
            for own, after in zip(prompts[::2], prompts[1::2], strict=True):
                assert after[:-1] == own  # each sample has two tokens before its span
                found.append(after[-1])
    firsts = sorted(ids[0] for ids in completions.values())
    assert sorted(found) == sorted(2 * firsts)  # under both prompts
    for batch in packed(distill_samples, located=False):
        assert batch.diagnosed is not None and not len(batch.diagnosed.student_before)


def test_a_gap_above_the_limit_ends_the_run_before_the_update(
    make_model: Any, distill_samples: list[TrainSample]
) -> None:
    model = make_model("Llama", torch.float32, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner = Learner(model, make_config(max_logprob_gap=1e-3))
    with pytest.raises(LogprobGapTooLarge, match=r"diagnose\.max_logprob_gap = 0\.001") as caught:
        learner.step(packed(distill_samples))
    assert isinstance(caught.value, RunFailed)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    learner = Learner(model, make_config(max_logprob_gap=100))
    assert learner.step(packed(distill_samples)).metrics["loss/logprob_gap_mean"] > 1e-3
