"""The correct solution that is shown beside a rollout: a correct sibling, or what replaces it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosd_fast.config import SelectConfig
    from rosd_fast.text.chat import Chats
    from rosd_fast.types import Group, Rollout, Verdict

REFERENCE = "reference"
ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A solution to show.

    id: of the rollout, or `REFERENCE` or `ANSWER`, which are no rollout's id.
    """

    id: str
    text: str


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


def demonstrate(
    group: Group,
    rollout: Rollout,
    verdicts: Mapping[str, Verdict],
    config: SelectConfig,
    policy: str,
    *,
    key: str = "",
    chats: Chats,
) -> Demonstration | None:
    """The solution that a teacher reads for `rollout`: a correct sibling, never the rollout itself.

    Without a sibling, `config.on_lone_success` decides for a correct rollout, and
    `config.on_no_success` for a wrong one. None: there is nothing to show.

    policy, key, chats: as for `choose_demonstration`.
    """
    shown = choose_demonstration(group, verdicts, policy, key=key, exclude=rollout.id, chats=chats)
    correct = verdicts[rollout.id].success
    replacement = config.on_lone_success if correct else config.on_no_success
    if shown is None and replacement == "own" and chats.shows(rollout):
        shown = rollout
    if shown is not None:
        return Demonstration(id=shown.id, text=chats.shown(shown)[0])
    if replacement == "reference" and group.problem.reference:
        return Demonstration(id=REFERENCE, text=group.problem.reference)
    return None
