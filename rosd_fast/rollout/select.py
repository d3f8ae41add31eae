"""Choose the groups to reflect on, before any reflection, so a dropped group costs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rosd_fast.config import SelectConfig
    from rosd_fast.types import Group, Problem, Verdict

Reason = Literal["no_success", "no_reference", "zero_variance"]
REASONS: tuple[Reason, ...] = ("no_success", "no_reference", "zero_variance")
"""Why a group is dropped: no rollout is correct; besides, its problem has no reference solution
that could replace one; all scores are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The groups that are kept, and counts over all groups."""

    kept: tuple[Group, ...]  # in the order of the step's groups
    num_groups: int
    num_no_success: int  # groups without a correct rollout
    num_lone_success: int  # groups with exactly one
    num_all_correct: int  # groups with nothing else
    num_zero_variance: int  # groups whose scores are all equal; may overlap with the others
    num_rescued: int  # groups without a correct rollout that are kept with a replacement for it
    dropped: Mapping[Reason, int]  # dropped groups by reason

    def describe(self) -> str:
        """A summary such as `1 of 16 groups kept; 15 without a success, 16 with equal scores`."""
        return (
            f"{len(self.kept)} of {self.num_groups} groups kept; "
            f"{self.num_no_success} without a success, {self.num_zero_variance} with equal scores"
        )

    def metrics(self) -> dict[str, float]:
        """The counts as `select/num_*`; `select/num_dropped_*` has one for each reason."""
        names = ("groups", "no_success", "lone_success", "all_correct", "zero_variance", "rescued")
        counts = {name: getattr(self, f"num_{name}") for name in names}
        counts |= {f"dropped_{reason}": self.dropped.get(reason, 0) for reason in REASONS}
        return {f"select/num_{name}": float(count) for name, count in counts.items()}


def select_groups(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    config: SelectConfig,
    *,
    needs_success: bool = True,
) -> Selection:
    """Drop groups without a correct rollout, or with equal scores, as `config` says.

    needs_success: of the method; one that learns from wrong rollouts alone keeps such groups.

    Raises ValueError when a rollout has no verdict.
    """
    kept = []
    counts: Counter[str] = Counter()
    dropped: Counter[Reason] = Counter()
    for group in groups:
        missing = [rollout.id for rollout in group.rollouts if rollout.id not in verdicts]
        if missing:
            raise ValueError(f"rollout {missing[0]} has no verdict")
        of_group = [verdicts[rollout.id] for rollout in group.rollouts]
        num_correct = sum(verdict.success for verdict in of_group)
        zero_variance = len({verdict.score for verdict in of_group}) <= 1
        counts["no_success"] += num_correct == 0
        counts["lone_success"] += num_correct == 1
        counts["all_correct"] += num_correct == len(of_group)
        counts["zero_variance"] += zero_variance
        hopeless = needs_success and num_correct == 0
        reason = _hopeless(group.problem, config) if hopeless else None
        if reason is None and config.drop_zero_variance and zero_variance:
            reason = "zero_variance"
        if reason is not None:
            dropped[reason] += 1
            continue
        counts["rescued"] += hopeless and config.on_no_success != "keep"
        kept.append(group)
    return Selection(
        kept=tuple(kept),
        num_groups=len(groups),
        num_no_success=counts["no_success"],
        num_lone_success=counts["lone_success"],
        num_all_correct=counts["all_correct"],
        num_zero_variance=counts["zero_variance"],
        num_rescued=counts["rescued"],
        dropped=dropped,
    )


def _hopeless(problem: Problem, config: SelectConfig) -> Reason | None:
    """Why a group without a correct rollout is dropped; None: it is kept."""
    if config.on_no_success == "skip":
        return "no_success"
    if config.on_no_success == "reference" and not problem.reference:
        return "no_reference"
    return None
