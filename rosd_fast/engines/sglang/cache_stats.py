"""What share of the prompt tokens a server's prefix cache held, and what share it could hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


class PrefixCacheStats:
    """Counts prompt tokens: all, those that were cached, and those that could have been."""

    def __init__(self) -> None:
        self._prompts: list[tuple[int, ...]] = []
        self._num_cached = 0

    def add(self, prompt_ids: tuple[int, ...], num_cached: int) -> None:
        """Count the prompt of one completion, of which the server had `num_cached` tokens."""
        self._prompts.append(prompt_ids)
        self._num_cached += num_cached

    def take_metrics(self) -> dict[str, float]:
        """Return `rollout/cached_frac` and `rollout/shareable_frac`, fractions of all prompt tokens
        since the last call; an empty dict if there were none."""
        prompts, self._prompts = self._prompts, []
        num_cached, self._num_cached = self._num_cached, 0
        if not prompts:
            return {}
        total = sum(map(len, prompts))
        return {
            "rollout/cached_frac": num_cached / total,
            "rollout/shareable_frac": num_shareable(prompts) / total,
        }


def num_shareable(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that a cache of all earlier prompts saves, in the best order.

    That is the number of tokens minus the nodes of the prompts' prefix tree. The last token of a
    prompt is always computed, because the first sampled token depends on it.
    """
    ordered = sorted(tuple(prompt) for prompt in prompts)
    return sum(min(common_length(a, b), len(b) - 1) for a, b in pairwise(ordered))


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two prompts."""
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return min(len(a), len(b))
