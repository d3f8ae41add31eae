"""Shared prefixes: which tokens the sequences of a micro-batch have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that is stored once for all sequences that have it.

    start, end: its tokens are [start, end) of each member, and members are equal up to `end`.
    parent: index of the segment before it, -1 if it begins its sequences.
    members: indices of the sequences.
    """

    start: int
    end: int
    parent: int
    members: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.end - self.start


class PrefixIndex:
    """Answers for any subset of `sequences` how they share their prefixes.

    Sequences are compared only here, each with its neighbour in sorted order (an LCP array,
    https://en.wikipedia.org/wiki/LCP_array); `tree` reads no tokens but those at which sequences
    diverge.

    sequences: the token ids of each sequence.
    """

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self.sequences = sequences
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        self._rank = {index: rank for rank, index in enumerate(order)}
        # [i]: tokens that the sequences of ranks i and i + 1 begin with.
        self._common = [common_length(sequences[a], sequences[b]) for a, b in pairwise(order)]

    def common_length(self, members: Sequence[int]) -> int:
        """The number of tokens that all of `members` begin with."""
        ranks = [self._rank[index] for index in members]
        first, last = min(ranks), max(ranks)
        if first == last:
            return len(self.sequences[members[0]])
        return min(self._common[first:last])

    def tree(self, members: Sequence[int], *, min_shared: int) -> list[Segment]:
        """The segments of the sequences `members`, parents first; no segment is empty.

        A prefix of fewer than `min_shared` tokens is stored separately for each sequence, unless
        the sequences are equal. min_shared 0: nothing is shared.

        >>> index = PrefixIndex([(1, 2, 3, 4), (1, 2, 5)])
        >>> [(s.start, s.end, s.parent) for s in index.tree([0, 1], min_shared=2)]
        [(0, 2, -1), (2, 4, 0), (2, 3, 0)]
        """
        if min_shared == 0:
            lengths = ((index, len(self.sequences[index])) for index in members)
            return [Segment(0, length, -1, (index,)) for index, length in lengths if length]
        tree: list[Segment] = []
        # (members, tokens that segments hold already, the last of these segments)
        stack = [(tuple(members), 0, -1)]
        while stack:
            group, start, parent = stack.pop()
            end = self.common_length(group)
            if end > start and (len(group) == 1 or end - start >= min_shared):
                tree.append(Segment(start, end, parent, group))
                start, parent = end, len(tree) - 1
            if len(group) == 1:
                continue
            branches: dict[int | None, list[int]] = defaultdict(list)
            for index in group:
                ids = self.sequences[index]
                branches[ids[end] if end < len(ids) else None].append(index)
            # Sequences that end here are equal: one segment holds what is left of them.
            if (ended := branches.pop(None, None)) and end > start:
                tree.append(Segment(start, end, parent, tuple(ended)))
            stack += [(tuple(branch), start, parent) for branch in reversed(branches.values())]
        return tree


def common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The number of tokens that both sequences begin with."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices are compared in C, so a binary search beats a loop over tokens
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
