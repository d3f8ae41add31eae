"""The choice of the groups that are reflected on."""

from __future__ import annotations

import pytest

from rosd_fast.config import SelectConfig
from rosd_fast.rollout.select import select_groups


@pytest.fixture(scope="module")
def step(make_group):
    """Groups: mixed, wrong with equal scores, wrong with different scores, right."""
    scores = {"mixed": (1.0, 0.0), "wrong": (0.0, 0.0), "partly": (0.5, 0.0), "right": (1.0, 1.0)}
    groups, verdicts = [], {}
    for name, own in scores.items():
        group, more = make_group(["one", "two"], own, id=name)
        groups.append(group)
        verdicts |= more
    return groups, verdicts


@pytest.mark.parametrize(
    ("require_success", "drop_zero_variance", "kept"),
    [
        (True, False, ["mixed", "right"]),
        (True, True, ["mixed"]),
        (False, True, ["mixed", "partly"]),
        (False, False, ["mixed", "wrong", "partly", "right"]),
    ],
)
def test_rules(step, require_success, drop_zero_variance, kept):
    config = SelectConfig(require_success=require_success, drop_zero_variance=drop_zero_variance)
    groups, verdicts = step
    selection = select_groups(groups, verdicts, config)
    assert [group.problem.id for group in selection.kept] == kept
    assert (selection.num_groups, selection.num_no_success, selection.num_zero_variance) == (
        4,
        2,
        2,
    )
    assert selection.describe() == (
        f"{len(kept)} of 4 groups kept; 2 without a success, 2 with equal scores"
    )


def test_no_groups_and_missing_verdicts(step):
    assert select_groups([], {}, SelectConfig()).kept == ()
    with pytest.raises(ValueError, match="mixed/0 has no verdict"):
        select_groups(step[0], {}, SelectConfig())
