"""A teacher that knows no more than the student teaches nothing: exactly, not nearly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.batch.weights import normalized
from rosd_fast.trainer.learner import Learner
from tests.methods.proof.quickstart import Quickstart, options

DIVERGENCES = ["jsd", "forward_kl", "reverse_kl"]
METHODS: dict[str, dict[str, Any]] = {
    "rosd": {},
    "sdpo": {"teacher__kind": "ema"},
    "opsd": {"teacher__kind": "live"},
    "opd": {"loss__policy_weight": 1.0},
    "grpo": {"loss__distill_weight": 0.05},
}


def gradients(
    quickstart: Quickstart,
    changes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    same_prompt: bool = True,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of the divergence alone, in the first step."""
    config = options(**changes)
    samples = [sample for sample in quickstart.samples(config) if sample.is_distilled]
    if same_prompt:
        samples = [replace(s, teacher_prompt_ids=s.student_prompt_ids) for s in samples]
    learner = Learner(quickstart.model(config, dtype), config)
    found: dict[str, torch.Tensor] = {}

    def take() -> float:
        masters = learner.optimizer.masters.items()
        found.update((name, m.grad.clone()) for name, m in masters if m.grad is not None)
        return 0.0

    setattr(learner.optimizer, "step", take)  # noqa: B010
    weighted = normalized(samples, config.policy.normalize, max_new_tokens=40)
    batches = pack(weighted, max_tokens=300, min_shared=config.pack.min_shared, hidden_size=192)
    assert len(batches) > 1
    return learner.step(batches).metrics, found


def assert_zero(metrics: dict[str, float], found: dict[str, torch.Tensor]) -> None:
    assert metrics["loss/num_distilled_tokens"] > 100
    assert metrics["loss/divergence"] == 0.0 and found
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_taught(quickstart: Quickstart, method: str, temperature: float) -> None:
    changes = METHODS[method] | {"method": method, "sample__temperature": temperature}
    assert_zero(*gradients(quickstart, changes))


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_by_any_divergence(quickstart: Quickstart, divergence: str, strategy: str) -> None:
    changes = {"loss__divergence": divergence, "loss__strategy": strategy, "loss__beta": 0.3}
    changes |= {"method": "sdpo", "sample__temperature": 0.6}
    assert_zero(*gradients(quickstart, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__top_k": 100},
        {"loss__top_k": 20, "loss__tail": False},
        {"lora__rank": 4, "loss__divergence": "reverse_kl"},
        {"loss__sparsity": "entry", "loss__divergence": "forward_kl"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_by_other_options(quickstart: Quickstart, changes: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "dtype" in changes else torch.float32
    assert_zero(*gradients(quickstart, {"method": "sdpo", **changes}, dtype))


def test_the_method_itself_teaches(quickstart: Quickstart) -> None:
    metrics, found = gradients(quickstart, {"method": "sdpo"}, same_prompt=False)
    assert metrics["loss/divergence"] > 1e-3
    assert all(gradient.any() for gradient in found.values())
