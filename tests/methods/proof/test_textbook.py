"""Loss and gradient of each method against its definition, on rollouts of the quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosd_fast.config import Config
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.types import Group
from tests.methods.proof.quickstart import Quickstart, Update, move_student, options, record
from tests.methods.proof.textbook import Textbook

METHODS: dict[str, dict[str, Any]] = {
    "rosd": {"method": "rosd"},
    "sdpo": {"method": "sdpo"},
    "opsd": {"method": "opsd", "loss__divergence": "forward_kl", "loss__entry_clip": 0.05},
    "opd": {
        "method": "opd",
        "loss__divergence": "reverse_kl",
        "teacher__model": "quickstart",
    },
    "grpo": {"method": "grpo"},
    "sft": {"method": "sft"},
    "sdpo and grpo": {"method": "sdpo", "loss__policy_weight": 0.5},
    "rosd and grpo": {
        "method": "rosd",
        "loss__distill_weight": 0.7,
        "loss__policy_weight": 0.3,
    },
    "grpo and kl": {
        "method": "grpo",
        "loss__distill_weight": 0.05,
        "loss__divergence": "reverse_kl",
        "loss__importance_clip": None,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {
        "method": "grpo",
        "policy__clip_high": 0.28,
        "policy__dual_clip": 1.3,
        "policy__mask_truncated": True,
    },
    "dr grpo": {
        "method": "grpo",
        "policy__normalize": "constant",
        "policy__advantage": "group_mean",
    },
    "sequence mean and entropy bonus": {
        "method": "grpo",
        "policy__normalize": "sequence",
        "policy__entropy_weight": 0.1,
        "policy__clip_low": 0.1,
    },
    "cool": {"method": "sdpo", "sample__temperature": 0.6, "loss__policy_weight": 1.0},
    "hot top 20 and tail": {"method": "rosd", "loss__temperature": 1.4, "loss__top_k": 20},
    "tiled": {"method": "opsd", "loss__beta": 0.2, "loss__strategy": "tiled"},
    "live": {"method": "sdpo", "teacher__kind": "live"},
    "lora": {"method": "sdpo", "loss__policy_weight": 0.5, "lora__rank": 4},
}


def plain(state: dict[str, torch.Tensor], config: Config, *, adapters: bool) -> Any:
    """The quickstart model in float64 as transformers loads it, with these weights."""
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, attn_implementation="sdpa", dtype=torch.float64
    )
    if adapters:
        from peft import LoraConfig

        lora = config.lora
        targets = "all-linear" if lora.targets == "all-linear" else lora.targets.split(",")
        model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    else:
        state = {n.replace(".base_layer.", "."): w for n, w in state.items() if "lora_" not in n}
    model.load_state_dict(state)
    return model.eval()


def expected(
    quickstart: Quickstart, config: Config, update: Update, groups: Sequence[Group] = ()
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of an update by the textbook.

    groups: those that the update trains on; empty: all that the step keeps.
    """
    student = plain(update.student, config, adapters=config.lora.rank > 0)
    loss = Textbook(
        student=student,
        teacher=plain(update.teacher, config, adapters=False),
        tokenizer=quickstart.inputs.model.tokenizer,
        config=config,
        groups=groups or quickstart.sampled(config).selection.kept,
        verdicts=quickstart.verdicts,
        reflections=quickstart.reflections,
    ).loss()
    named = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, [named[name] for name in update.gradients])
    return float(loss.detach()), dict(zip(update.gradients, gradients, strict=True))


def assert_close(
    update: Update, loss: float, gradients: dict[str, torch.Tensor], bound: float
) -> None:
    """Loss and every gradient agree within `bound`, relative to the largest entry of each."""
    assert abs(loss) > 1e-3 and update.loss == pytest.approx(loss, rel=bound)
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert largest > 1e-3 and len(gradients) == len(update.gradients)
    for name, gradient in gradients.items():
        error = float((update.gradients[name].double() - gradient).abs().max())
        assert error <= bound * float(gradient.abs().max()) + 1e-3 * bound * largest, name


@pytest.mark.parametrize("case", [*METHODS, *VARIANTS])
def test_a_method_against_its_definition(quickstart: Quickstart, case: str, tmp_path: Path) -> None:
    """In float64, where log-probabilities of rollouts, weights and norms are float32."""
    config = options(**(METHODS | VARIANTS)[case])
    with quickstart.run(config, tmp_path, torch.float64) as run:
        move_student(run.learners.learner)
        updates = record(run)
        metrics = quickstart.step(run)
    (update,) = updates
    assert_close(update, *expected(quickstart, config, update), 1e-6)
    assert metrics["loss/num_micro_batches"] > 1
    if config.method in ("grpo", "sft") and not config.loss.distill_weight:
        assert metrics["policy/loss"] == pytest.approx(update.loss, rel=1e-6)
    if config.method == "grpo":
        assert 0.02 < metrics["policy/clipped_frac"] < 0.5


@pytest.mark.parametrize("case", ["rosd and grpo", "opsd", "sft"])
def test_in_float32(quickstart: Quickstart, case: str, tmp_path: Path) -> None:
    config = options(**METHODS[case])
    with quickstart.run(config, tmp_path, torch.float32) as run:
        move_student(run.learners.learner)
        updates = record(run)
        quickstart.step(run)
    assert_close(updates[0], *expected(quickstart, config, updates[0]), 1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "grpo", "policy__normalize": "sequence"},
        {
            "method": "sdpo",
            "loss__policy_weight": 0.5,
            "teacher__kind": "ema",
            "teacher__ema_rate": 0.2,
            "select__on_no_success": "keep",
        },
    ],
    ids=["grpo", "sdpo and grpo, ema"],
)
def test_two_updates_per_step(
    quickstart: Quickstart, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The first two problems, then the third, each with its own normalizer; the average moves."""
    config = options(**changes, optim__updates_per_step=2, optim__lr=1e-3)
    with quickstart.run(config, tmp_path, torch.float64) as run:
        move_student(run.learners.learner)
        updates = record(run)
        quickstart.step(run)
    parts = (quickstart.groups[:2], quickstart.groups[2:])
    for update, groups in zip(updates, parts, strict=True):
        assert_close(update, *expected(quickstart, config, update, groups), 1e-6)
    first, second = updates
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((second.student[name] - first.student[name]).abs().max()) > 5e-4
    if config.teacher.kind == "ema":
        moved = 0.8 * first.teacher[name] + 0.2 * second.student[name]
        torch.testing.assert_close(second.teacher[name], moved, rtol=0, atol=1e-12)


def test_likelihood_with_bfloat16_weights(quickstart: Quickstart, tmp_path: Path) -> None:
    """Gradients of bfloat16 weights are summed over micro-batches in float32, as good as one."""
    config = options(method="sft", dtype="bfloat16")
    with quickstart.run(config, tmp_path, torch.bfloat16) as run:
        learner = run.learners.learner
        updates = record(run)
        metrics = quickstart.step(run)
        moved = {n: m.detach().clone() for n, m in learner.optimizer.masters.items()}
    (update,) = updates
    loss, gradients = expected(quickstart, config, update)
    assert update.loss == pytest.approx(loss, rel=0.02) and metrics["loss/num_micro_batches"] > 1
    for name, gradient in gradients.items():
        assert update.gradients[name].dtype == moved[name].dtype == torch.float32
        error = (update.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 0.05, f"{name}: {error:.3f}"
        rise = ((moved[name] - update.student[name]) * gradient).sum()
        assert rise < 0, f"{name} moved uphill"
