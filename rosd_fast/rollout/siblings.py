"""The correct rollout of a group that is shown beside another one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosd_fast.text.chat import Chats
    from rosd_fast.types import Group, Rollout, Verdict


def choose_demonstration(
    group: Group,
    verdicts: Mapping[str, Verdict],
    policy: str,
    *,
    key: str = "",
    exclude: str | None = None,
    chats: Chats,
) -> Rollout | None:
    """A correct rollout of the group: the `first`, the `shortest` in tokens, or a `random` one.

    key: seeds the random choice. exclude: a rollout id that is not chosen. chats: a rollout of
    which prompts show nothing is not chosen either. None when no other rollout is correct.
    """
    correct = [
        rollout
        for rollout in group.rollouts
        if verdicts[rollout.id].success and rollout.id != exclude and chats.shows(rollout)
    ]
    if policy == "shortest":
        correct.sort(key=lambda rollout: len(rollout.completion_ids))
    if policy == "random" and correct:
        return random.Random(key).choice(correct)
    return correct[0] if correct else None
