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
    ("on_no_success", "drop_zero_variance", "kept"),
    [
        ("skip", False, ["mixed", "right"]),
        ("skip", True, ["mixed"]),
        ("keep", True, ["mixed", "partly"]),
        ("keep", False, ["mixed", "wrong", "partly", "right"]),
        ("answer", False, ["mixed", "wrong", "partly", "right"]),
        ("reference", False, ["mixed", "right"]),
    ],
)
def test_rules(step, on_no_success, drop_zero_variance, kept):
    config = SelectConfig(on_no_success=on_no_success, drop_zero_variance=drop_zero_variance)
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


@pytest.mark.parametrize(
    ("on_no_success", "dropped", "rescued"),
    [
        ("skip", {"no_success": 2}, 0),
        ("reference", {"no_reference": 1}, 1),
        ("answer", {}, 2),
        ("keep", {}, 0),
    ],
)
def test_hopeless_groups_are_counted_by_what_became_of_them(
    make_group, step, on_no_success, dropped, rescued
):
    solved = make_group(["one", "two"], (0.5, 0.0), id="partly", reference="1 + 1 = 2")[0]
    groups = [solved if group.problem.id == "partly" else group for group in step[0]]
    config = SelectConfig(on_no_success=on_no_success)
    selection = select_groups(groups, step[1], config)
    assert selection.dropped == dropped
    assert selection.metrics() == {
        "select/num_groups": 4,
        "select/num_no_success": 2,
        "select/num_lone_success": 1,
        "select/num_all_correct": 1,
        "select/num_zero_variance": 2,
        "select/num_rescued": rescued,
        "select/num_dropped_no_success": dropped.get("no_success", 0),
        "select/num_dropped_no_reference": dropped.get("no_reference", 0),
        "select/num_dropped_zero_variance": 0,
    }
    everything = select_groups(groups, step[1], config, needs_success=False)
    assert len(everything.kept) == 4 and everything.num_rescued == 0


def test_a_rescued_group_may_still_have_equal_scores(step):
    config = SelectConfig(on_no_success="answer", drop_zero_variance=True)
    groups, verdicts = step
    selection = select_groups(groups, verdicts, config)
    assert [group.problem.id for group in selection.kept] == ["mixed", "partly"]
    assert selection.dropped == {"zero_variance": 2} and selection.num_rescued == 1


def test_no_groups_and_missing_verdicts(step):
    assert select_groups([], {}, SelectConfig()).kept == ()
    with pytest.raises(ValueError, match="mixed/0 has no verdict"):
        select_groups(step[0], {}, SelectConfig())
