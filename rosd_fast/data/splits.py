"""Splits: hold problems out, and keep one problem from being in two splits.

    keys of the problems -> divide -> Division: who trains, who is held out, what was in two splits

Everything depends on the keys alone (see keys.py): not on the order of the rows, nor on the seed of
training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rosd_fast.data.keys import Keys, first_seen
from rosd_fast.errors import UserError

TRAIN, DEV, OOD = "data.train", "data.dev", "data.dev_ood"
NAMED = 3  # pairs of problems that a sentence names

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Problems that are in two splits.

    pairs: [m, 2] index in `split`, and the first index of the same problem in `other`.
    dropped: whether they are left out of `split`.
    """

    split: str
    other: str
    pairs: np.ndarray
    dropped: bool

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Which problems of each data set a split consists of; the indices are in file order.

    train: of the training data.
    held_out: of the training data; None: data.dev is no share. In an order of their own, which is
        the same for any order of the rows, as the first ones may be all that is evaluated.
    ood: of data.dev_ood; None: there is none.
    overlaps: those that are not empty.
    """

    train: np.ndarray
    held_out: np.ndarray | None
    ood: np.ndarray | None
    overlaps: tuple[Overlap, ...]


def parse_share(text: str, *, where: str = DEV) -> float | None:
    """The share that "10%" stands for, in (0, 1); None when `text` names data instead.

    Raises UserError for a share that is none, or none that can be held out.
    """
    stripped = text.strip()
    if re.fullmatch(r"[0-9.]+", stripped) and not Path(stripped).exists():
        raise UserError(
            f"there is no file {stripped}",
            where=where,
            fix="To hold out a share of the training problems give it in percent, as in 10%",
        )
    if "%" not in stripped or not stripped.endswith("%"):
        return None
    match = _SHARE.fullmatch(stripped)
    share = float(match[1]) / 100 if match else 0.0
    if match and 0 < share < 1:
        return share
    raise UserError(
        f"{text!r} is not a share of the training problems that can be held out",
        where=where,
        fix="Give more than 0% and less than 100%, as in 10% or 2.5%, or a file; none: no split",
    )


def is_held_out(keys: Keys, *, share: float, seed: int) -> np.ndarray:
    """[n] bool: whether each problem is in the share that is held out.

    A problem is when the hash of its key and the seed is in the lowest `share` of all hashes: equal
    problems always are together, and a problem held out stays so when rows are added.
    """
    return _rank(keys, seed) < np.uint64(int(share * 2**64))


def divide(
    train: Keys,
    *,
    dev: Keys | None,
    ood: Keys | None,
    share: float | None = None,
    seed: int = 0,
    drop: bool = True,
) -> Division:
    """Divide the problems with these keys into splits.

    dev: None with a share, or without an in-domain split. drop: a problem in two splits is left out
    of one: of training before all others, of data.dev_ood before data.dev. With drop no key is in
    two splits. Raises UserError for a split that comes out empty.
    """
    if share is not None and dev is not None:
        raise ValueError("data.dev is both a share and a data set")
    overlaps = []

    def kept(split: str, keys: Keys, other: str, others: Keys | None) -> np.ndarray:
        pairs = in_both(keys, others) if others is not None else np.empty((0, 2), np.int64)
        if len(pairs):
            overlaps.append(Overlap(split=split, other=other, pairs=pairs, dropped=drop))
        stays = np.ones(len(keys), bool)
        stays[pairs[:, 0]] = not drop
        return stays

    in_ood = None if ood is None else np.flatnonzero(kept(OOD, ood, DEV, dev))
    stays = kept(TRAIN, train, DEV, dev) & kept(TRAIN, train, OOD, ood)
    for split, empty in ((TRAIN, not stays.any()), (OOD, in_ood is not None and not len(in_ood))):
        if empty:
            raise all_dropped(split, [each for each in overlaps if each.split == split])
    held_out = None
    if share is not None:
        chosen = is_held_out(train, share=share, seed=seed) & stays
        check_share(chosen[stays], share=share)
        held_out = np.flatnonzero(chosen)
        held_out = held_out[np.lexsort((held_out, _rank(train[held_out], seed)))]
        stays &= ~chosen
    return Division(
        train=np.flatnonzero(stays), held_out=held_out, ood=in_ood, overlaps=tuple(overlaps)
    )


def in_both(keys: Keys, others: Keys) -> np.ndarray:
    """[m, 2] for each of `keys` that is among `others`: its index, and the first index there."""
    here = np.flatnonzero(np.isin(keys, others))
    first = first_seen(others) if len(here) else {}
    there = [first[key] for key in keys[here].tolist()]
    return np.stack([here, np.array(there, np.int64)], axis=1)


def check_share(chosen: np.ndarray, *, share: float) -> None:
    """Raise UserError if none or all of the problems are held out. chosen: [n] bool."""
    if chosen.any() and not chosen.all():
        return
    which, fix = ("all", "smaller") if chosen.any() else ("none", "larger")
    raise UserError(
        f"{share * 100:g}% of {len(chosen):,} problems holds {which} of them out",
        where=DEV,
        fix=f"Give a {fix} share, more problems, a file, or none for no split",
    )


def all_dropped(split: str, overlaps: Sequence[Overlap]) -> UserError:
    """The error for a split all of whose problems are in others too."""
    others = " or ".join(dict.fromkeys(each.other for each in overlaps))
    return UserError(
        f"every problem is in {others} too",
        where=split,
        fix="Give other problems, hold a share of the training problems out with data.dev=10%, or "
        "keep them in both with data.overlap=keep",
    )


def describe_overlap(
    overlap: Overlap, name: Callable[[int], str], other: Callable[[int], str]
) -> str:
    """A line on the problems in two splits.

    name, other: the name of a problem by its index in `split`, and in `other`.

    "data.train: 2 problems are in data.dev too and left out: train.jsonl:17 = dev.jsonl:3, ..."
    """
    one = len(overlap) == 1
    verb = "problem is" if one else "problems are"
    left_out = " and left out" if overlap.dropped else ""
    shown = named_pairs(overlap.pairs.tolist(), name, "=", other)
    return f"{overlap.split}: {len(overlap):,} {verb} in {overlap.other} too{left_out}: {shown}"


def named_pairs(
    pairs: Sequence[Sequence[int]],
    name: Callable[[int], str],
    sign: str,
    other: Callable[[int], str],
) -> str:
    """The first few pairs by name, and "..." where there are more."""
    shown = [f"{name(i)} {sign} {other(j)}" for i, j in pairs[:NAMED]]
    return ", ".join([*shown, *(["..."] if len(pairs) > NAMED else [])])


def _rank(keys: Keys, seed: int) -> np.ndarray:
    """[n] uint64, evenly spread, and another for each seed (the mixing of splitmix64)."""
    start = np.uint64(seed % 2**64) + np.uint64(1)
    with np.errstate(over="ignore"):
        return _spread(keys ^ _spread(np.full(1, start)))


def _spread(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
