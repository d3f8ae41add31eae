"""Splits: shares are held out by the problem alone, and no problem is in two splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.keys import Keys, as_keys, problem_key
from rosd_fast.data.splits import (
    DEV,
    OOD,
    TRAIN,
    describe_overlap,
    divide,
    is_held_out,
    parse_share,
)
from rosd_fast.errors import UserError

MANY = as_keys(problem_key(f"problem {i}") for i in range(20_000))
keys_of = st.lists(st.integers(0, 25).map(lambda i: problem_key(f"problem {i}")), min_size=1)
shares = st.floats(0.01, 0.99)


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), (" 2.5 % ", 0.025), (".5%", 0.005), ("99.9%", 0.999)]
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["dev.jsonl", "quickstart:dev", "a%b.jsonl"])
def test_names_of_data_are_no_shares(text: str) -> None:
    assert parse_share(text) is None


@pytest.mark.parametrize("text", ["10", "0.1"])
def test_a_bare_number_is_a_file_or_a_mistake(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data\.dev: there is no file .* in percent, as in 10%"):
        parse_share(text)
    Path(text).touch()
    assert parse_share(text) is None


@pytest.mark.parametrize(
    "text", ["0%", "0.0%", "100%", "250%", "-5%", "ten%", "%", "1e1%", "nan%", "a.jsonl,10%"]
)
def test_shares_that_cannot_be_held_out(text: str) -> None:
    with pytest.raises(UserError, match=r"^data\.dev: .* is not a share .* as in 10% or 2\.5%"):
        parse_share(text)


@given(shares, st.integers(0, 2**32), st.permutations(range(50)), st.integers(0, 50))
def test_a_hold_out_depends_on_the_problem_alone(
    share: float, seed: int, order: list[int], count: int
) -> None:
    keys = MANY[:50]
    held = is_held_out(keys, share=share, seed=seed)
    assert (is_held_out(keys[order], share=share, seed=seed) == held[order]).all()
    assert (is_held_out(keys[:count], share=share, seed=seed) == held[:count]).all()


@pytest.mark.parametrize("share", [0.025, 0.1, 0.5])
def test_the_share_is_met_and_seeds_differ(share: float) -> None:
    held = [is_held_out(MANY, share=share, seed=seed) for seed in range(3)]
    for each in held:
        assert each.mean() == pytest.approx(share, rel=0.1)
    assert (held[0] & held[1]).mean() == pytest.approx(share**2, rel=0.35)
    larger = is_held_out(MANY, share=share * 1.5, seed=0)
    assert (larger | ~held[0]).all()  # a larger share holds the same problems out, and more


def splits_of(
    train: Keys, dev: Keys | None, ood: Keys | None, share: float | None, seed: int
) -> dict[str, set[int]]:
    """The keys of each split, without those that do not exist."""
    found = divide(train, dev=dev, ood=ood, share=share, seed=seed)
    splits = {TRAIN: set(train[found.train].tolist())}
    if dev is not None:
        splits[DEV] = set(dev.tolist())
    if found.held_out is not None:
        splits[DEV] = set(train[found.held_out].tolist())
    if ood is not None:
        assert found.ood is not None
        splits[OOD] = set(ood[found.ood].tolist())
    return splits


@given(
    keys_of,
    st.none() | keys_of,
    st.none() | keys_of,
    st.none() | shares,
    st.integers(0, 100),
)
def test_no_problem_is_in_two_splits(
    train: list[int],
    dev: list[int] | None,
    ood: list[int] | None,
    share: float | None,
    seed: int,
) -> None:
    if share is not None:
        dev = None
    in_dev, in_ood = (None if keys is None else as_keys(keys) for keys in (dev, ood))
    try:
        splits = splits_of(as_keys(train), in_dev, in_ood, share, seed)
    except UserError:  # a split came out empty
        return
    assert all(splits.values())
    assert sum(map(len, splits.values())) == len(set.union(*splits.values()))
    everything = {*train, *(dev or ()), *(ood or ())}
    assert set.union(*splits.values()) == everything  # and none is lost


@given(st.permutations(range(40)), st.integers(0, 9))
def test_the_order_of_rows_changes_no_split(order: list[int], seed: int) -> None:
    train, ood = MANY[:40], MANY[35:50]
    found = divide(train, dev=None, ood=ood, share=0.3, seed=seed)
    other = divide(train[order], dev=None, ood=ood, share=0.3, seed=seed)
    assert found.held_out is not None and other.held_out is not None
    assert train[found.held_out].tolist() == train[order][other.held_out].tolist()
    assert set(train[found.train].tolist()) == set(train[order][other.train].tolist())


def test_overlaps_are_counted_and_named() -> None:
    train, dev, ood = MANY[[1, 2, 3, 2, 4, 9]], MANY[[7, 2, 2, 3]], MANY[[3, 4, 8]]
    found = divide(train, dev=dev, ood=ood)
    assert found.train.tolist() == [0, 5]
    assert found.ood is not None and found.ood.tolist() == [1, 2]
    assert [(o.split, o.other, o.pairs.tolist()) for o in found.overlaps] == [
        (OOD, DEV, [[0, 3]]),
        (TRAIN, DEV, [[1, 1], [2, 3], [3, 1]]),
        (TRAIN, OOD, [[2, 0], [4, 1]]),
    ]
    kept = divide(train, dev=dev, ood=ood, drop=False)
    assert kept.train.tolist() == [*range(6)] and kept.ood is not None and len(kept.ood) == 3
    assert [len(o) for o in kept.overlaps] == [1, 3, 2]
    text = describe_overlap(found.overlaps[1], "train.jsonl:{}".format, "dev.jsonl:{}".format)
    assert text == (
        "data.train: 3 problems are in data.dev too and left out: train.jsonl:1 = dev.jsonl:1, "
        "train.jsonl:2 = dev.jsonl:3, train.jsonl:3 = dev.jsonl:1"
    )
    text = describe_overlap(kept.overlaps[0], "ood.jsonl:{}".format, "dev.jsonl:{}".format)
    assert text == "data.dev_ood: 1 problem is in data.dev too: ood.jsonl:0 = dev.jsonl:3"


def test_long_overlaps_name_the_first_few() -> None:
    [overlap] = divide(MANY[:2000], dev=MANY[:1500], ood=None).overlaps
    text = describe_overlap(overlap, str, str)
    assert text.startswith("data.train: 1,500 problems are in data.dev too and left out: 0 = 0, ")
    assert text.endswith("2 = 2, ...")


def test_splits_that_come_out_empty() -> None:
    with pytest.raises(UserError, match=r"data\.train: every problem is in data\.dev too.*keep"):
        divide(MANY[:3], dev=MANY[:5], ood=None)
    with pytest.raises(UserError, match=r"data\.train: .* in data\.dev or data\.dev_ood too"):
        divide(MANY[:3], dev=MANY[:2], ood=MANY[2:5])
    with pytest.raises(UserError, match=r"data\.dev_ood: every problem is in data\.dev too"):
        divide(MANY[:9], dev=MANY[2:3], ood=MANY[2:3])
    with pytest.raises(UserError, match=r"data\.dev: 0\.1% of 3 problems holds none .* larger"):
        divide(MANY[:3], dev=None, ood=None, share=0.001)
    with pytest.raises(UserError, match=r"data\.dev: 99\.9% of 3 problems holds all .* smaller"):
        divide(MANY[:3], dev=None, ood=None, share=0.999)
    both = divide(MANY[:3], dev=MANY[:3], ood=MANY[:3], drop=False)
    assert len(both.train) == 3


def test_copies_of_a_problem_are_held_out_together() -> None:
    keys = np.repeat(MANY[:30], 3)
    found = divide(keys, dev=None, ood=None, share=0.4)
    assert found.held_out is not None
    assert (np.bincount(found.held_out // 3, minlength=30) % 3 == 0).all()
