"""Near-duplicates: problems that ask the same in nearly the same words.

Two problems are near-duplicates when three things hold:

    answers   are the same text
    figures   the numbers, operators, variables and names such as NaCl are the same, in order
    words     of all different words in the two, three quarters or more are in both

So two problems of one template that differ in a number, in a formula or in their answer are not.
Problems with equal keys are the same problem, not a near-duplicate (see keys.py).

    figures and answer -> buckets -> MinHash of the words, in bands -> pairs -> compared exactly
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from zlib import crc32

import numpy as np

from rosd_fast.data.keys import normal_text

Text = tuple[str, str]
"""Prompt and answer of a problem."""

MIN_JACCARD = 0.75
BANDS, ROWS = 10, 4  # a pair at MIN_JACCARD shares a band with a chance of 0.98
CHUNK = 4096  # texts whose words are in memory at a time

_TOKEN = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)+|\w+|[-+*/^=<>%±×÷√≤≥≠]")
_WORD = re.compile(r"\w+")
_NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand million billion half third quarter double twice triple thrice dozen".split()
)


def similar_pairs(texts: Sequence[Text]) -> np.ndarray:
    """[p, 2] indices of near-duplicates among texts with different keys, the lower index first.

    Of a group of near-duplicates each is in a pair, but not every pair is named. Linear in the
    number of texts; the texts are read at most three times.
    """
    buckets = np.fromiter((_bucket(*text) for text in texts), np.uint64, len(texts))
    _, which, sizes = np.unique(buckets, return_inverse=True, return_counts=True)
    members = np.flatnonzero(sizes[which.reshape(-1)] > 1)
    if not len(members):
        return np.empty((0, 2), np.int64)
    signatures = _signatures([texts[i][0] for i in part] for part in _parts(members))
    found = [
        (i, j)
        for i, j in _candidates(buckets[members], signatures)
        if _jaccard(texts[members[i]][0], texts[members[j]][0]) >= MIN_JACCARD
    ]
    return members[np.array(found, np.int64).reshape(-1, 2)]


def figures(prompt: str) -> list[str]:
    """The parts of a prompt that make another problem of it when they change.

    >>> figures("Anna pays 3.50 for two kg of NaCl; what is x - 1?")
    ['3', '50', 'two', 'NaCl', 'x', '-', '1']
    """
    text = prompt if prompt.isascii() else unicodedata.normalize("NFKC", prompt)
    return [token for token in _TOKEN.findall(text) if _is_figure(token)]


@lru_cache(maxsize=1 << 16)
def _is_figure(token: str) -> bool:
    """Whether a token is a number, operator, variable, or a name with capitals inside."""
    if "-" in token and len(token) > 1:
        return all(len(part) == 1 or _is_figure(part) for part in token.split("-"))
    if len(token) == 1:
        return token not in "aAiI"
    if token.isascii() and token.isalpha() and token[1:].islower():
        return token.lower() in _NUMBERS
    return any(c.isdigit() or c.isupper() for c in token[1:]) or token[0].isdigit()


def _bucket(prompt: str, answer: str) -> int:
    text = "\x1f".join([*figures(prompt), "\x1e", normal_text(answer)])
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _words(prompt: str) -> set[str]:
    return set(_WORD.findall(normal_text(prompt)))


def _jaccard(one: str, other: str) -> float:
    a, b = _words(one), _words(other)
    return len(a & b) / max(1, len(a | b))


def _parts(members: np.ndarray) -> Iterator[list[int]]:
    edges = range(0, len(members) + CHUNK, CHUNK)
    return (members[start:end].tolist() for start, end in pairwise(edges))


def _signatures(parts: Iterable[Sequence[str]]) -> np.ndarray:
    """[n, BANDS] uint64: per band a hash of the smallest values of ROWS hash functions."""
    random = np.random.default_rng(0)
    factors = random.integers(1 << 63, size=(2, BANDS * ROWS), dtype=np.uint64) * 2 + 1
    bands = []
    for prompts in parts:
        words = [
            [crc32(word.encode("utf-8", "surrogatepass")) for word in _words(p)] or [0]
            for p in prompts
        ]
        starts = np.cumsum([0, *map(len, words)])[:-1]
        flat = np.concatenate([np.array(each, np.uint64) for each in words])
        smallest = np.stack(
            [np.minimum.reduceat(_mix(flat * factor), starts) for factor in factors[0]], axis=1
        )
        mixed = _mix(smallest * factors[1])
        bands.append(mixed.reshape(len(prompts), BANDS, ROWS).sum(axis=2, dtype=np.uint64))
    return np.concatenate(bands)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values ^ (values >> np.uint64(31))
    values = values * np.uint64(0x7FB5D329728EA185)
    return values ^ (values >> np.uint64(27))


def _candidates(buckets: np.ndarray, signatures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of one bucket that agree in a band: neighbours, and each with the band's first."""
    pairs: set[tuple[int, int]] = set()
    for band in signatures.T:
        keys = _mix(buckets + _mix(band))
        order = np.argsort(keys, kind="stable")
        edges = np.concatenate([[0], np.flatnonzero(np.diff(keys[order])) + 1, [len(order)]])
        for place in np.flatnonzero(np.diff(edges) > 1):
            run = order[edges[place] : edges[place + 1]].tolist()
            pairs.update(pairwise(run))
            pairs.update((run[0], other) for other in run[1:])
    return sorted(pairs)
