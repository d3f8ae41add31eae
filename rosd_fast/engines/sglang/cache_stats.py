"""How much of the prompts a prefix cache served, and how much it could have served."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


class PrefixCacheStats:
    """Counts prompt tokens: all, those that were cached, and those that could have been."""

    def __init__(self) -> None:
        self._prompts: list[tuple[int, ...]] = []
        self._num_cached = 0

    def add(self, prompt_ids: tuple[int, ...], num_cached: int) -> None:
        """One completion's prompt, and how many of its tokens the server had."""
        self._prompts.append(prompt_ids)
        self._num_cached += num_cached

    def take_metrics(self) -> dict[str, float]:
        """`rollout/cached_frac` and `rollout/shareable_frac` of all prompt tokens since the last
        call; empty where there were none."""
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
    """Tokens that a cache of all earlier prompts saves, in the best order.

    That is all of them less the nodes of their prefix tree. The last token of a prompt is always
    computed: the first one sampled depends on it.
    """
    ordered = sorted(tuple(prompt) for prompt in prompts)
    return sum(min(common_length(a, b), len(b) - 1) for a, b in pairwise(ordered))


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))
