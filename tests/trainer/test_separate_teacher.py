"""A teacher of another width, depth, family and vocabulary size, against full float64 logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.model.layouts import hidden_states
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.separate_teacher import local_rows, with_rows
from rosd_fast.utils.distributed import World
from tests.tiny import VOCAB, mark_trainable

WIDE = {"hidden_size": 48, "num_hidden_layers": 3, "tie_word_embeddings": False}


def config_of(**sections: Any) -> Config:
    optim = {"lr": 1e-2, "warmup_steps": 0}
    return Config.model_validate({"method": "opd", "optim": optim, **sections})


def own_prompts(samples: list[Any]) -> list[Any]:
    """The samples as `opd` makes them: the teacher reads the student's prompt."""
    return [replace(sample, teacher_prompt_ids=sample.student_prompt_ids) for sample in samples]


def full_logits_loss(student: Any, teacher: Any, samples: Any, options: Config) -> torch.Tensor:
    """The loss of a step, from the logits of both models on the entries that both have."""
    loss, count, beta = torch.zeros((), dtype=torch.float64), 0, options.loss.beta
    rows = min(model.lm_head.weight.shape[0] for model in (student, teacher))
    for sample in samples:
        ids = torch.tensor([*sample.student_prompt_ids, *sample.completion_ids])[None]
        first = len(sample.student_prompt_ids) + sample.start - 1
        p, q = (
            (model(ids).logits[0, first:-1, :rows] / options.sample.temperature).log_softmax(-1)
            for model in (student, teacher)
        )
        q = q.detach()
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        values = {
            "forward_kl": (q.exp() * (q - p)).sum(-1),
            "reverse_kl": (p.exp() * (p - q)).sum(-1),
            "jsd": (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1),
        }[options.loss.divergence]
        sampled = p.gather(1, ids[0, first + 1 :, None])[:, 0].detach()
        ratio = (sampled - torch.tensor(sample.logprobs[sample.start :])).exp()
        loss = loss + (sample.weight * ratio.clamp(max=2.0) * values).sum()
        count += len(values)
    return loss / count


def gradients_of(learner: Learner, batches: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(gradients that reach the optimizer by name, the step's result); no weight changes."""
    with monkeypatch.context() as patch:
        patch.setattr(learner.optimizer, "step", lambda: 1.0)
        result = learner.step(batches)
    masters: dict[str, Any] = learner.optimizer.masters
    gradients = {name: p.grad.clone() for name, p in masters.items()}
    learner.optimizer.zero_grad()
    return gradients, result


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "tied"),
    [(VOCAB, VOCAB + 8, True), (VOCAB + 8, VOCAB, False), (VOCAB + 8, VOCAB, True)],
)
def test_loss_and_gradient(
    make_model,
    distill_samples,
    monkeypatch,
    student_rows: int,
    teacher_rows: int,
    tied: bool,
    strategy: str,
    divergence: str,
) -> None:
    options = config_of(
        loss={"divergence": divergence, "beta": 0.3, "strategy": strategy},
        sample={"temperature": 0.8},
    )
    samples = own_prompts(distill_samples)
    student = make_model("Llama", vocab_size=student_rows, tie_word_embeddings=tied)
    teacher = make_model("Qwen3", seed=1, vocab_size=teacher_rows, **WIDE)
    loss = full_logits_loss(student, teacher, samples, options)
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    learner = Learner(student, options, teacher=teacher)
    assert (learner.vocab_size, learner.num_head_rows) == (VOCAB, student_rows)
    batches = pack(samples, max_tokens=40, min_shared=2)
    assert len(batches) > 1
    gradients, result = gradients_of(learner, batches, monkeypatch)
    for name, gradient in expected.items():
        bound = 1e-6 * float(gradient.abs().max()) + 1e-9  # weights and log-probs are float32
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=bound)
    assert (not tied and student_rows > VOCAB) or "lm_head.weight" not in expected
    if student_rows > VOCAB:
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        assert not gradients[head][VOCAB:].any() and gradients[head][:VOCAB].any()
    assert result.metrics["loss/divergence"] > 0.01
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    learner.step(batches)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not any(name.startswith("teacher.") for name in learner.state_dict())


def test_padding_rows_change_nothing(make_model, distill_samples) -> None:
    """The same teacher with more rows, of any values, gives the same step to the bit."""
    samples, results = own_prompts(distill_samples), []
    plain = make_model("Qwen3", seed=1, **WIDE)
    for rows in (VOCAB, VOCAB + 24):
        teacher = make_model("Qwen3", seed=1, vocab_size=rows, **WIDE)
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                source = dict(plain.named_parameters())[name]
                parameter[: len(source)].copy_(source)
        learner = Learner(make_model(), config_of(), teacher=teacher)
        batches = pack(samples, max_tokens=60, min_shared=2)
        results.append([learner.step(batches).metrics for _ in range(3)])
    assert results[0] == results[1]


def test_a_copy_of_the_student_teaches_nothing(make_model, distill_samples, monkeypatch) -> None:
    learner = Learner(make_model(), config_of(), teacher=make_model())
    batches = pack(own_prompts(distill_samples), max_tokens=60, min_shared=2)
    gradients, result = gradients_of(learner, batches, monkeypatch)
    assert result.metrics["loss/divergence"] == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("lora", [0, 3])
def test_training_moves_the_student_to_the_teacher(make_model, distill_samples, lora: int) -> None:
    options = config_of(lora={"rank": lora}, loss={"importance_clip": None})
    student = make_model("Llama", torch.float32)
    mark_trainable(student, options)
    learner = Learner(student, options, teacher=make_model("Qwen3", torch.float32, seed=1, **WIDE))
    assert learner.teacher is not None and learner.teacher.model is not student
    batches = pack(own_prompts(distill_samples), max_tokens=60, min_shared=2)
    values = [learner.step(batches).metrics["loss/divergence"] for _ in range(25)]
    assert values[-1] < 0.5 * values[0]


def test_offloading_changes_nothing(make_model, distill_samples) -> None:
    results = []
    for offload in (False, True):
        options = config_of(teacher={"offload": offload, "model": "other"})
        learner = Learner(make_model(), options, teacher=make_model("Qwen3", seed=1, **WIDE))
        batches = pack(own_prompts(distill_samples), max_tokens=60, min_shared=2)
        results.append([learner.step(batches).metrics for _ in range(2)])
    assert results[0] == results[1]


def test_with_a_policy_gradient_the_rows_are_the_same(make_model, distill_samples) -> None:
    """Both losses see the common entries, and share one vocabulary order."""
    loss = {"strategy": "tiled", "sparsity": "mass", "policy_weight": 1.0}
    student = make_model("Llama", torch.float32, vocab_size=VOCAB + 8)
    teacher = make_model("Qwen3", torch.float32, seed=1, **WIDE)
    learner = Learner(student, config_of(loss=loss), teacher=teacher)
    reinforced = [
        replace(sample, teacher_prompt_ids=None, advantage=0.5, weight=0.1)
        for sample in distill_samples
    ]
    batches = pack([*own_prompts(distill_samples), *reinforced], max_tokens=80, min_shared=2)
    metrics = learner.step(batches).metrics
    assert metrics["loss/skipped"] == 0 and metrics["policy/ratio_mean"] > 0


def test_top_k_is_limited_by_the_common_entries(make_model) -> None:
    options = config_of(loss={"top_k": VOCAB + 4})
    teacher = make_model("Qwen3", seed=1, **WIDE)
    with pytest.raises(UserError, match=f"loss.top_k: {VOCAB + 4} is more than .* {VOCAB} tokens"):
        Learner(make_model(vocab_size=VOCAB + 8), options, teacher=teacher)


def test_unequal_soft_caps_are_refused(make_model) -> None:
    teacher = make_model("Gemma2", seed=1, final_logit_softcapping=30.0, sliding_window=4)
    with pytest.raises(UserError, match=r"soft cap 30.0 and the student's None") as error:
        Learner(make_model(), config_of(), teacher=teacher)
    assert "\n" not in str(error.value)


def test_scaled_logits_on_one_side(make_model, distill_samples, monkeypatch) -> None:
    options = config_of(loss={"divergence": "reverse_kl"})
    samples = own_prompts(distill_samples)
    student = make_model("Granite", logits_scaling=3.0)
    teacher = make_model("Cohere", seed=1, logit_scale=0.5, hidden_size=48)
    loss = full_logits_loss(student, teacher, samples, options)
    expected = torch.autograd.grad(loss, student.model.norm.weight)[0]
    gradients, _ = gradients_of(
        Learner(student, options, teacher=teacher), pack(samples, max_tokens=999), monkeypatch
    )
    torch.testing.assert_close(gradients["model.norm.weight"], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("rows", "student_rows"), [(64, 64), (64, 67), (46, 47)])
def test_each_rank_keeps_the_common_rows_of_its_own(
    monkeypatch, ranks: int, rows: int, student_rows: int
) -> None:
    parts = torch.arange(student_rows).chunk(ranks)  # as DTensor does
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    for rank, part in enumerate(parts):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        assert local_rows(rows, student_rows, World()) == int((part < rows).sum())


def test_a_rank_without_common_rows_is_refused(monkeypatch) -> None:
    """On every rank, so that none waits for the others."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        with pytest.raises(UserError, match=r"parallel.head: shard: the last of 4 ranks would"):
            local_rows(60, 80, World())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [VOCAB - 8, VOCAB, VOCAB + 8])
def test_a_head_with_other_rows_shares_all_else(make_model, rows: int, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    other = with_rows(model, rows)
    assert (other is model) == (rows == VOCAB and not tied)
    assert other.lm_head.weight.shape[0] == rows
    assert other.lm_head.weight is not other.model.embed_tokens.weight
    assert other.model.norm.weight is model.model.norm.weight
    kept = min(rows, VOCAB)
    assert torch.equal(other.lm_head.weight[:kept], model.lm_head.weight[:kept])
    assert not other.lm_head.weight[kept:].any()
    for name, parameter in before.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)
    packed = pack_one()
    with torch.no_grad():
        assert torch.equal(hidden_states(other, packed), hidden_states(model, packed))


def pack_one() -> Any:
    from rosd_fast.types import PackedSequences

    ids = torch.arange(3, 12)
    return PackedSequences(
        input_ids=ids, position_ids=torch.arange(9), cu_seqlens=(0, 9), gather=torch.arange(9)
    )
