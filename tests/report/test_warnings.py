"""Signs of collapse are named once, when they show, and healthy runs have none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rosd_fast.report.warnings import SIGNS, Watch, warnings

HEALTHY = {
    "loss/num_distilled_tokens": 900.0,
    "loss/grad_norm": 0.05,
    "loss/student_entropy": 0.3,
    "loss/logprob_gap_mean": 1e-4,
    "rollout/truncated_frac": 0.02,
    "rollout/tokens_mean": 200.0,
}


def run(num_steps: int, late: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Rows of a run whose metrics are `late` from step 5 on."""
    return [
        {"step": step, **HEALTHY, **((late or {}) if step >= 5 else {})}
        for step in range(1, num_steps + 1)
    ]


@pytest.mark.parametrize(
    ("cause", "late", "step"),
    [
        ("gradient", {"loss/grad_norm": 2e-6}, 7),
        ("entropy", {"loss/student_entropy": 0.001}, 7),
        ("truncated", {"rollout/truncated_frac": 0.3}, 6),
        ("shortened", {"rollout/tokens_mean": 40.0}, 6),
        ("logprob gap", {"loss/logprob_gap_mean": 0.2}, 5),
    ],
)
def test_each_sign_is_named_once_at_the_step_that_shows_it(
    cause: str, late: dict[str, float], step: int
) -> None:
    found = warnings(run(20, late))
    assert [(each.cause, each.step) for each in found] == [(cause, step)]
    assert "\n" not in found[0].text and len(found[0].text) > 60
    assert cause in SIGNS


def test_a_healthy_run_has_none() -> None:
    assert warnings(run(50)) == []
    assert warnings([]) == []
    assert warnings([{"step": 0, "eval/dev/accuracy": 0.5}]) == []


def test_one_bad_step_is_not_a_collapse() -> None:
    rows = run(20)
    rows[9] |= {"loss/grad_norm": 0.0, "loss/student_entropy": 0.0, "rollout/truncated_frac": 0.2}
    assert warnings(rows) == []


def test_runs_without_a_teacher_are_watched_too() -> None:
    late = {"policy/entropy_mean": 1e-4, "policy/logprob_gap_mean": 0.5}
    rows = [{"step": row["step"], "loss/num_policy_tokens": 9.0, **late} for row in run(4)]
    assert [each.cause for each in warnings(rows)] == ["logprob gap", "entropy"]


def test_steps_that_train_nothing_and_evaluations_do_not_count() -> None:
    idle = {"loss/num_distilled_tokens": 0.0, "loss/grad_norm": 0.0}
    rows: list[dict[str, Any]] = run(12)
    for row in rows[3:]:
        row |= idle
    assert warnings(rows) == []
    rows = run(8, {"loss/grad_norm": 0.0})
    rows.insert(5, {"step": 5, "eval/dev/accuracy": 0.5})
    assert [each.step for each in warnings(rows)] == [7]


def test_values_that_are_not_finite_are_no_sign() -> None:
    assert warnings(run(20, dict.fromkeys(HEALTHY, math.nan) | {"loss/num_policy_tokens": 1})) == []


def test_a_resumed_run_does_not_repeat_a_warning() -> None:
    rows = run(20, {"loss/grad_norm": 0.0})
    assert Watch(rows[:10]).add(rows[10]) == []
    early = Watch(rows[:6])
    assert [each.cause for each in early.add(rows[6])] == ["gradient"]
