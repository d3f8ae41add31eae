"""Tensors made from arrays equal those of `torch.tensor`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.batch.tensors import to_tensor


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers(values: list[int]) -> None:
    expected = torch.tensor(values, dtype=torch.int64)
    made = to_tensor(iter(values))
    assert made.dtype == torch.int64 and torch.equal(made, expected)


@given(values=st.lists(st.floats() | st.floats(width=32)))
def test_floats_round_alike(values: list[float]) -> None:
    """To the nearest float32, also where that is infinite, zero or subnormal."""
    expected = torch.tensor(values, dtype=torch.float32)
    made = to_tensor(values, torch.float32)
    assert made.dtype == torch.float32 and made.shape == expected.shape
    numbers = torch.tensor([not math.isnan(value) for value in values], dtype=torch.bool)
    assert torch.equal(made.isnan(), ~numbers)
    assert torch.equal(made[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@given(values=st.lists(st.booleans()))
def test_booleans(values: list[bool]) -> None:
    made = to_tensor(values, torch.bool)
    assert made.dtype == torch.bool and made.tolist() == values


def test_tensors_own_their_memory() -> None:
    made = to_tensor([1, 2, 3])
    made += 1
    assert made.tolist() == [2, 3, 4] and to_tensor([1, 2, 3]).tolist() == [1, 2, 3]


def test_an_integer_out_of_range_is_refused() -> None:
    with pytest.raises(OverflowError):
        to_tensor([2**63])
