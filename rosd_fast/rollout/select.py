"""Choose the groups to reflect on, before any reflection, so a dropped group costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosd_fast.config import SelectConfig
    from rosd_fast.types import Group, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The groups that are kept, and counts over all groups."""

    kept: tuple[Group, ...]  # in the order of the step's groups
    num_groups: int
    num_no_success: int  # groups without a correct rollout
    num_zero_variance: int  # groups whose scores are all equal; may overlap with the former

    def describe(self) -> str:
        """A summary such as `1 of 16 groups kept; 15 without a success, 16 with equal scores`."""
        return (
            f"{len(self.kept)} of {self.num_groups} groups kept; "
            f"{self.num_no_success} without a success, {self.num_zero_variance} with equal scores"
        )


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
    num_no_success = num_zero_variance = 0
    for group in groups:
        missing = [rollout.id for rollout in group.rollouts if rollout.id not in verdicts]
        if missing:
            raise ValueError(f"rollout {missing[0]} has no verdict")
        of_group = [verdicts[rollout.id] for rollout in group.rollouts]
        no_success = not any(verdict.success for verdict in of_group)
        zero_variance = len({verdict.score for verdict in of_group}) <= 1
        num_no_success += no_success
        num_zero_variance += zero_variance
        if config.require_success and needs_success and no_success:
            continue
        if config.drop_zero_variance and zero_variance:
            continue
        kept.append(group)
    return Selection(
        kept=tuple(kept),
        num_groups=len(groups),
        num_no_success=num_no_success,
        num_zero_variance=num_zero_variance,
    )
