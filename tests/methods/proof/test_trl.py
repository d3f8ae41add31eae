"""GRPO's loss and the divergences against those of TRL, on the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rosd_fast.types import TrainSample
from rosd_kernels import span_divergence
from tests.methods.proof.quickstart import Quickstart, move_student, options, record
from tests.methods.proof.test_textbook import assert_close, plain

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("bnpo", {}),
    "token over the update": ("dapo", {"policy__clip_high": 0.28}),
    "sequence": ("grpo", {"policy__normalize": "sequence"}),
    "constant": (
        "dr_grpo",
        {"policy__normalize": "constant", "policy__advantage": "group_mean"},
    ),
    "dual clip": ("bnpo", {"policy__dual_clip": 1.5}),
    "entropy bonus": ("bnpo", {"policy__entropy_weight": 0.1}),
}


def padded(samples: list[TrainSample]) -> dict[str, Tensor]:
    """The rollouts as TRL pads them: prompts on the left, completions on the right."""

    def rows(values: list[Any], dtype: torch.dtype, side: str) -> tuple[Tensor, Tensor]:
        tensors = [torch.tensor(value, dtype=dtype) for value in values]
        ones = [torch.ones(len(value), dtype=torch.int64) for value in values]
        pad = {"batch_first": True, "padding_side": side}
        return pad_sequence(tensors, **pad), pad_sequence(ones, **pad)

    prompts = rows([s.student_prompt_ids for s in samples], torch.int64, "left")
    completions = rows([s.completion_ids for s in samples], torch.int64, "right")
    logprobs, _ = rows([s.logprobs for s in samples], torch.float64, "right")
    return {
        "prompt_ids": prompts[0],
        "prompt_mask": prompts[1],
        "completion_ids": completions[0],
        "completion_mask": completions[1],
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float64),
        "old_per_token_logps": logprobs,
        "num_items_in_batch": completions[1].sum(),
    }


@pytest.mark.parametrize("case", CASES)
def test_grpo_as_trl(quickstart: Quickstart, case: str, tmp_path: Path) -> None:
    """Our normalizers are its loss types: token bnpo or dapo, sequence grpo, constant dr_grpo."""
    loss_type, changes = CASES[case]
    from tests.methods.proof.trl_losses import GrpoLoss

    config = options(method="grpo", **changes)
    with quickstart.run(config, tmp_path, torch.float64) as run:
        move_student(run.learners.learner)
        updates = record(run)
        quickstart.step(run)
    (update,) = updates
    student = plain(update.student, config, adapters=False)
    inputs = padded(list(quickstart.samples(config)))
    assert len(inputs["advantages"]) == 12 and (inputs["advantages"] == 0).sum() == 4
    loss = GrpoLoss(student, loss_type, config)._compute_loss(student, inputs)
    named = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, [named[name] for name in update.gradients])
    theirs = dict(zip(update.gradients, gradients, strict=True))
    assert_close(update, float(loss.detach()), theirs, 1e-6)


@pytest.mark.parametrize("strategy", ["chunked", "tiled", "reference"])
@pytest.mark.parametrize(
    ("divergence", "beta"),
    [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)],
)
def test_divergences_as_trl(divergence: Any, beta: float, strategy: Any) -> None:
    """Its generalized JSD has the KLs at the ends of beta; ours have names."""
    from tests.methods.proof.trl_losses import generalized_jsd_loss

    g = torch.Generator().manual_seed(0)
    states, teacher = torch.randn(2, 7, 16, generator=g, dtype=torch.float64)
    heads = 0.5 * torch.randn(2, 301, 16, generator=g, dtype=torch.float64)
    states.requires_grad_()
    own_beta: Any = {"beta": beta} if divergence == "jsd" else {}
    ours = span_divergence(
        states,
        teacher,
        heads[0],
        heads[1],
        divergence=divergence,
        temperature=0.6,
        strategy=strategy,
        **own_beta,
    ).loss
    theirs = generalized_jsd_loss(
        (states @ heads[0].T)[None],
        (teacher @ heads[1].T)[None],
        beta=beta,
        temperature=0.6,
        reduction="sum",
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    (own,), (other,) = (torch.autograd.grad(loss, states) for loss in (ours, theirs))
    torch.testing.assert_close(own, other, rtol=0, atol=1e-10 * float(other.abs().max()))
