"""The loss glue, the learner, the optimizer and the teacher on a tiny random Llama."""

from __future__ import annotations

import copy
import dataclasses
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.model.head import head, logits
from rosd_fast.model.layouts import hidden_states
from rosd_fast.model.policy import PolicyModel
from rosd_fast.trainer import learner as learner_module
from rosd_fast.trainer.learner import Learner, TrainingDiverged
from rosd_fast.trainer.loss import span_loss
from rosd_fast.trainer.optim import Optimizer
from rosd_fast.trainer.teacher import Teacher
from rosd_fast.types import PackedBatch, PackedSequences
from tests.tiny import SHAPE, VOCAB


def tiny_model(dtype=torch.float32, *, tied=True, family="llama"):
    torch.manual_seed(0)
    model: Any
    if family == "granite":
        model = GraniteForCausalLM(
            GraniteConfig(**SHAPE, logits_scaling=3.0, tie_word_embeddings=tied)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def policy(model) -> PolicyModel:
    return PolicyModel(module=model, device=model.device)


def config(**sections) -> Config:
    """Options by section, e.g. loss={"divergence": "jsd"}; no warm-up by default."""
    sections["optim"] = {"lr": 1e-2, "warmup_steps": 0} | sections.get("optim", {})
    return Config.model_validate(sections)


def sample(index: int, seed: int = 0) -> dict:
    """A random sample: student prompt, teacher prompt, completion, span, log-probs and weight."""
    g = torch.Generator().manual_seed(1000 * seed + index)

    def ids(low: int, high: int) -> torch.Tensor:
        return torch.randint(
            0, VOCAB, (int(torch.randint(low, high, (), generator=g)),), generator=g
        )

    completion = ids(3, 12)
    start = int(torch.randint(0, len(completion), (), generator=g))
    return {
        "id": f"p{index}/0",
        "student": ids(2, 6),
        "teacher": ids(5, 15),
        "completion": completion,
        "start": start,
        "logprobs": -4 * torch.rand(len(completion), generator=g),
        "weight": 0.5 + float(torch.rand((), generator=g)),
    }


def packed(samples: list[dict], prompt: str) -> PackedSequences:
    rows, ids, bounds = [], [], [0]
    for s in samples:
        sequence = torch.cat([s[prompt], s["completion"]])
        first = bounds[-1] + len(s[prompt]) - 1 + s["start"]
        rows.append(torch.arange(first, first + len(s["completion"]) - s["start"]))
        ids.append(sequence)
        bounds.append(bounds[-1] + len(sequence))
    return PackedSequences(
        input_ids=torch.cat(ids),
        position_ids=torch.cat([torch.arange(len(x)) for x in ids]),
        cu_seqlens=tuple(bounds),
        gather=torch.cat(rows),
    )


def batch(samples: list[dict]) -> PackedBatch:
    counts = torch.tensor([len(s["completion"]) - s["start"] for s in samples])
    return PackedBatch(
        rollout_ids=tuple(s["id"] for s in samples),
        problem_ids=tuple(s["id"] for s in samples),
        student=packed(samples, "student"),
        teacher=packed(samples, "teacher"),
        token_ids=torch.cat([s["completion"][s["start"] :] for s in samples]),
        weights=torch.tensor([s["weight"] for s in samples]).repeat_interleave(counts),
        rollout_logprobs=torch.cat([s["logprobs"][s["start"] :] for s in samples]),
        sample_index=torch.arange(len(samples)).repeat_interleave(counts),
    )


def dense_divergence(p_log, q_log, kind: str, beta: float):
    """The divergences by their definitions: [N, V] log-probabilities -> [N]."""
    p, q = p_log.exp(), q_log.exp()
    m_log = (beta * q + (1 - beta) * p).log()
    return {
        "forward_kl": lambda: (q * (q_log - p_log)).sum(-1),
        "reverse_kl": lambda: (p * (p_log - q_log)).sum(-1),
        "jsd": lambda: (
            beta * (q * (q_log - m_log)).sum(-1) + (1 - beta) * (p * (p_log - m_log)).sum(-1)
        ),
    }[kind]()


def dense_step(model, teacher, samples, options: Config):
    """Gradients and metrics from full logits, one sample at a time, through the plain forward."""
    temperature = options.loss.temperature or options.sample.temperature
    total, divergence, importance_sum, per_token = 0, 0.0, 0.0, {}
    loss = torch.zeros((), dtype=torch.float64)
    for s in samples:
        rows = []
        for prompt, network in (("student", model), ("teacher", teacher)):
            ids = torch.cat([s[prompt], s["completion"]])
            first = len(s[prompt]) - 1 + s["start"]
            rows.append(F.log_softmax(network(ids[None]).logits[0, first:-1] / temperature, dim=-1))
        p_log, q_log = rows[0], rows[1].detach()
        tokens = s["completion"][s["start"] :]
        lp = p_log.detach().gather(1, tokens[:, None])[:, 0]
        ratio = (lp - s["logprobs"][s["start"] :]).exp()
        clip = options.loss.importance_clip
        importance = torch.ones_like(lp) if clip is None else ratio.clamp(max=clip)
        values = dense_divergence(p_log, q_log, options.loss.divergence, options.loss.beta)
        loss = loss + (s["weight"] * importance * values).sum()
        divergence += float((s["weight"] * values.detach()).sum())
        importance_sum += float(importance.sum())
        per_token[s["id"]] = values.tolist()
        total += len(tokens)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss / total, parameters)
    metrics = {
        "loss/divergence": divergence / total,
        "loss/importance_weight_mean": importance_sum / total,
        "loss/num_distilled_tokens": total,
        "loss/grad_norm": float(torch.stack([g.norm() for g in gradients]).norm()),
    }
    return dict(zip(names, gradients, strict=True)), metrics, per_token


def gradients_of_step(learner: Learner, batches, monkeypatch) -> dict[str, torch.Tensor]:
    """The gradients that reach the optimizer; its step is disabled."""
    with monkeypatch.context() as patch:
        patch.setattr(learner.optimizer, "step", lambda: 1.0)
        learner.step(batches)
    masters: dict[str, Any] = learner.optimizer.masters
    gradients = {name: master.grad.clone() for name, master in masters.items()}
    learner.optimizer.zero_grad()
    return gradients


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "jsd", "beta": 0.3, "importance_clip": 1.2},
        {"divergence": "forward_kl", "importance_clip": None, "temperature": 0.7},
        {"divergence": "reverse_kl"},
    ],
    ids=lambda loss: loss["divergence"],
)
def test_step_against_dense_logits(family, loss, monkeypatch):
    options = config(loss=loss, sample={"temperature": 1.3})
    model = tiny_model(torch.float64, family=family)
    learner = Learner(model, options)
    with torch.no_grad():  # teacher and student apart
        for p in learner.teacher.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    samples = [sample(i) for i in range(5)]
    expected, metrics, per_token = dense_step(model, learner.teacher.model, samples, options)
    batches = [batch(samples[:2]), batch(samples[2:])]
    actual = gradients_of_step(learner, batches, monkeypatch)
    for name, gradient in expected.items():
        bound = 1e-6 * float(gradient.abs().max()) + 1e-9  # weights and log-probs are float32
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=bound)
    result = learner.step(batches)
    for key, value in metrics.items():
        assert result.metrics[key] == pytest.approx(value, rel=1e-5), key
    assert result.metrics["loss/skipped"] == 0
    assert result.per_token.keys() == per_token.keys()
    for key, values in per_token.items():
        assert result.per_token[key] == pytest.approx(values, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_micro_batches_do_not_change_the_gradient(dtype, bound, monkeypatch):
    samples = [sample(i) for i in range(6)]
    learner = Learner(tiny_model(dtype), config())
    with torch.no_grad():
        learner.teacher.model.lm_head.weight.mul_(1.1)
    whole = gradients_of_step(learner, [batch(samples)], monkeypatch)
    scale = max(float(g.abs().max()) for g in whole.values())
    assert scale > 1e-4
    for cuts in ([1] * 6, [1, 5], [3, 3], [4, 1, 1]):
        rest = iter(samples)
        parts = [batch(list(islice(rest, cut))) for cut in cuts]
        split = gradients_of_step(learner, parts, monkeypatch)
        for name, gradient in whole.items():
            assert float((split[name] - gradient).abs().max()) <= bound * max(1, scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_gradient_is_summed_in_place(dtype, tied, monkeypatch):
    """Micro-batches add it to one float32 buffer; the gradients are those that autograd gives."""
    samples = [sample(i) for i in range(4)]
    batches = [batch(samples[:2]), batch(samples[2:])]
    found, made = [], []
    for in_place in (True, False):
        learner = Learner(tiny_model(dtype, tied=tied), config())
        if not in_place:
            monkeypatch.setattr(Learner, "_head_sum", lambda self: None)
        of_head = learner.optimizer.gradient_sum(learner.policy.head.weight)
        made.append(of_head)
        found.append(gradients_of_step(learner, batches, monkeypatch))
    assert made[0] is not None and made[0].dtype == torch.float32
    assert found[0].keys() == found[1].keys()
    rounding = 1e-5 if dtype == torch.float32 else 2e-2  # autograd's bfloat16 is rounded twice
    for name, want in found[1].items():
        assert (found[0][name] - want).abs().max() <= rounding * want.abs().max(), name


def test_a_head_that_is_not_trained_or_offloaded_has_no_buffer():
    model = tiny_model(tied=False)
    offloaded = Learner(model, config(optim={"offload": True}))
    assert offloaded.optimizer.gradient_sum(offloaded.policy.head.weight) is not None  # on a CPU
    frozen = tiny_model(tied=False)
    frozen.lm_head.weight.requires_grad_(False)
    learner = Learner(frozen, config())
    assert learner.optimizer.gradient_sum(learner.policy.head.weight) is None


def test_training_moves_the_student_to_the_teacher():
    learner = Learner(tiny_model(), config(loss={"importance_clip": None}))
    batches = [batch([sample(i) for i in range(4)])]
    values = [learner.step(batches).metrics["loss/divergence"] for _ in range(12)]
    assert values[-1] < 0.5 * values[0]


def test_no_batches_change_nothing():
    learner = Learner(tiny_model(), config(teacher={"kind": "ema"}))
    before = {name: w.clone() for name, w in learner.weights.items()}
    result = learner.step([])
    assert result.metrics["loss/num_distilled_tokens"] == 0 and result.per_token == {}
    assert all(torch.equal(w, before[name]) for name, w in learner.weights.items())
    assert learner.optimizer.num_updates == 0


def test_a_non_finite_step_is_skipped_and_five_in_a_row_end_the_run():
    learner = Learner(tiny_model(), config(teacher={"kind": "ema"}))
    good = batch([sample(0), sample(1)])
    bad = dataclasses.replace(good, weights=torch.full_like(good.weights, float("nan")))
    learner.step([good])
    before = {n: w.clone() for n, w in (learner.weights | learner.state_dict()).items()}
    for _ in range(4):
        result = learner.step([good, bad])
        assert result.metrics["loss/skipped"] == 1
        assert "loss/divergence" not in result.metrics and "loss/grad_norm" not in result.metrics
    after = learner.weights | learner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert learner.step([good]).metrics["loss/skipped"] == 0  # resets the count
    for _ in range(4):
        learner.step([bad])
    with pytest.raises(TrainingDiverged, match=r"optim\.lr"):
        learner.step([bad])


def test_an_infinite_loss_with_a_finite_gradient_is_skipped(monkeypatch):
    def infinite(*args, **kwargs):
        output = span_loss(*args, **kwargs)
        return dataclasses.replace(output, loss=output.loss + float("inf"))

    monkeypatch.setattr(learner_module, "span_loss", infinite)
    learner = Learner(tiny_model(), config())
    before = {name: w.clone() for name, w in learner.weights.items()}
    assert learner.step([batch([sample(0)])]).metrics["loss/skipped"] == 1
    assert all(torch.equal(w, before[name]) for name, w in learner.weights.items())


def test_a_non_finite_gradient_is_skipped():
    learner = Learner(tiny_model(), config())
    before = {name: w.clone() for name, w in learner.weights.items()}
    poison = learner.model.model.norm.weight.register_hook(lambda g: g * float("inf"))
    assert learner.step([batch([sample(0)])]).metrics["loss/skipped"] == 1
    poison.remove()
    assert all(torch.equal(w, before[name]) for name, w in learner.weights.items())


def test_teacher_is_frozen_by_default():
    learner = Learner(tiny_model(), config())
    before = {name: w.clone() for name, w in learner.teacher.model.state_dict().items()}
    learner.step([batch([sample(0)])])
    assert all(
        torch.equal(w, before[name]) for name, w in learner.teacher.model.state_dict().items()
    )
    assert not torch.equal(learner.weights["lm_head.weight"], before["lm_head.weight"])
    assert not any(p.requires_grad for p in learner.teacher.model.parameters())


def test_ema_teacher_moves_after_each_step():
    learner = Learner(tiny_model(), config(teacher={"kind": "ema", "ema_rate": 0.25}))
    for _ in range(2):
        before = {name: w.clone() for name, w in learner.teacher.model.state_dict().items()}
        learner.step([batch([sample(0)])])
        for name, weight in learner.weights.items():
            expected = 0.75 * before[name] + 0.25 * weight
            torch.testing.assert_close(
                learner.teacher.model.state_dict()[name], expected, rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_kept_in_fp32(dtype):
    model = tiny_model(dtype)
    options = config(teacher={"kind": "ema", "ema_rate": 0.01}).teacher
    teacher = Teacher(policy(model), options, policy(copy.deepcopy(model)))
    expected = {name: p.detach().float() for name, p in model.named_parameters()}
    for step in range(50):
        student = {n: p.detach().float() + 1e-3 * step for n, p in model.named_parameters()}
        teacher.update(student)
        expected = {n: 0.99 * e + 0.01 * student[n] for n, e in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(teacher.state_dict()[name], value, rtol=0, atol=1e-6)
        # What the teacher computes with is the average, rounded once.
        assert torch.equal(teacher.model.state_dict()[name], teacher.state_dict()[name].to(dtype))


@pytest.mark.parametrize("tied", [True, False])
def test_the_teacher_has_its_own_head(tied):
    model = tiny_model(tied=tied)
    teacher = Teacher(policy(model), config().teacher, policy(copy.deepcopy(model)))
    ids = packed([sample(0)], "teacher")

    def score():
        with teacher.scoring(ids) as (states, teacher_head):
            assert not states.requires_grad
            return logits(states, teacher_head)

    before = score()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(score(), before)
    assert hidden_states(model, ids).requires_grad and head(model).weight.requires_grad


def reference_adamw(p, g, state, *, lr, b1, b2, eps, decay):
    """One step of the paper's algorithm, in float64."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g * g
    m, v = state["m"] / (1 - b1 ** state["t"]), state["v"] / (1 - b2 ** state["t"])
    return p - lr * decay * p - lr * m / (v.sqrt() + eps)


def test_optimizer_against_the_formula():
    options = config(
        optim={"lr": 0.01, "warmup_steps": 4, "weight_decay": 0.1, "grad_clip": 0.5}
    ).optim
    torch.manual_seed(0)
    named = {
        "matrix": torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)),
        "vector": torch.nn.Parameter(torch.randn(4, dtype=torch.float64)),
    }
    optimizer = Optimizer(named.items(), options, horizon=100)
    expected = {name: p.detach().clone() for name, p in named.items()}
    states: dict[str, dict] = {name: {} for name in named}
    for update in range(1, 8):
        gradients = {
            n: torch.randn_like(p) * (0.01 if update == 3 else 1) for n, p in named.items()
        }
        for name, p in named.items():
            p.grad = gradients[name].clone()
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        lr = 0.01 * min(1, update / 4)
        assert optimizer.lr == pytest.approx(lr)
        assert optimizer.step() == pytest.approx(float(norm))
        for name in named:
            expected[name] = reference_adamw(
                expected[name],
                gradients[name] * min(1.0, 0.5 / (float(norm) + 1e-6)),
                states[name],
                lr=lr,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                decay=0.1 if name == "matrix" else 0.0,
            )
            torch.testing.assert_close(named[name].detach(), expected[name], rtol=0, atol=1e-9)
    assert all(p.grad is None for p in named.values())


def test_bfloat16_weights_are_trained_through_fp32_masters():
    parameter = torch.nn.Parameter(torch.full((4, 4), 0.02, dtype=torch.bfloat16))
    options = config(optim={"lr": 1e-5, "weight_decay": 0.0}).optim
    optimizer = Optimizer([("w", parameter)], options, horizon=100)
    for _ in range(40):
        for _ in range(2):  # two micro-batches
            parameter.grad = torch.ones_like(parameter)
            optimizer.accumulate()
        assert optimizer.step() == pytest.approx(8.0)
    # 40 steps of 1e-5; the bfloat16 neighbours of 0.02 are 1.2e-4 away.
    torch.testing.assert_close(
        optimizer.masters["w"].detach(), torch.full((4, 4), 0.02002 - 4e-4), rtol=0, atol=2e-5
    )
    assert torch.equal(parameter, optimizer.masters["w"].bfloat16())
    assert float(parameter.detach()[0, 0]) < 0.0198


def test_bfloat16_step():
    learner = Learner(tiny_model(torch.bfloat16), config())
    result = learner.step([batch([sample(i) for i in range(3)])])
    assert result.metrics["loss/skipped"] == 0 and result.metrics["loss/grad_norm"] > 0


def test_top_k_beyond_the_vocabulary_is_named():
    with pytest.raises(UserError, match=r"loss\.top_k"):
        Learner(tiny_model(), config(loss={"top_k": VOCAB + 1}))


@pytest.mark.parametrize("strategy", ["auto", "tiled"])
@pytest.mark.parametrize("rule", ["entry", "mass"])
def test_sparsity_drops_little_and_reports_how_much(rule, strategy, monkeypatch):
    samples = [sample(i) for i in range(6)]
    batches = [batch(samples[:3]), batch(samples[3:])]
    exact = Learner(tiny_model(), config())
    loss = {"sparsity": rule, "sparsity_bound": 1e-3, "strategy": strategy}
    sparse = Learner(tiny_model(), config(loss=loss))
    for learner in (exact, sparse):
        torch.manual_seed(1)
        with torch.no_grad():  # teacher and student apart
            for p in learner.teacher.model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    wanted = gradients_of_step(exact, batches, monkeypatch)
    got = gradients_of_step(sparse, batches, monkeypatch)
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name
    metrics = sparse.step(batches).metrics
    assert 0 < metrics["loss/active_frac"] <= 1
    assert 0 <= metrics["loss/dropped_mass_max"] <= 1e-3 * VOCAB
    assert metrics["loss/grad_error_bound"] >= 0
    assert "loss/active_frac" not in exact.step(batches).metrics


def test_the_vocabulary_order_survives_a_reload():
    assert Learner(tiny_model(), config(loss={"sparsity": "entry"})).order is None  # chunked
    loss = {"sparsity": "entry", "strategy": "tiled"}
    first = Learner(tiny_model(), config(loss=loss))
    first.step([batch([sample(i) for i in range(3)])])
    state = first.state_dict()
    assert first.order is not None and int(state["order.0.num_seen"]) == first.order.num_seen > 0
    second = Learner(tiny_model(), config(loss=loss))
    second.load_state_dict(state)
    assert second.order is not None
    assert torch.equal(second.order.mass, first.order.mass)
    assert "order.0.mass" not in Learner(tiny_model(), config()).state_dict()
    unordered = Learner(tiny_model(), config(loss=loss | {"vocabulary_order": False}))
    assert unordered.order is None


@pytest.mark.parametrize(
    "loss",
    [
        {"top_k": 3, "strategy": "tiled"},
        {"top_k": 3, "sparsity": "entry"},
        {"strategy": "reference", "sparsity": "mass"},
    ],
    ids=str,
)
def test_loss_options_that_exclude_each_other(loss):
    with pytest.raises(ValueError, match=r"loss\.(top_k|sparsity) is"):
        config(loss=loss)
