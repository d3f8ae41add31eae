"""Which layout a model gets, and that each computes what the model does for a sequence alone."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.errors import UserError
from rosd_fast.model.fsdp import skeleton
from rosd_fast.model.layouts import (
    WholeSequences,
    choose_layout,
    hidden_states,
    layout_of,
)
from rosd_fast.types import PackedSequences
from tests.float64 import float64
from tests.model.test_attention import IDS, assert_equal, gradients
from tests.tiny import tiny_model

TREE = PackedSequences(  # "a b", "a b c d", "a b c e", "f"
    input_ids=torch.tensor([11, 12, 13, 14, 15, 16]),
    position_ids=torch.tensor([0, 1, 2, 3, 3, 0]),
    cu_seqlens=(0, 2, 3, 4, 5, 6),
    gather=torch.arange(6),
    parents=(-1, 0, 1, 1, -1),
)

LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 2}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_model(family, dtype, **IDS | changes)


@pytest.mark.parametrize(
    ("family", "changes", "layout"),
    [
        ("Llama", {}, "shared"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "shared"),
        ("Llama4Text", LLAMA4 | {"attn_temperature_tuning": False}, "shared"),
        ("Llama4Text", LLAMA4, "padded"),
        ("Bloom", {"n_head": 4, "n_layer": 1}, "padded"),
        ("Mpt", {"n_heads": 4, "logit_scale": "inv_sqrt_d_model"}, "padded"),  # it is not read
        ("Mamba", {}, "padded"),
    ],
)
def test_the_first_layout_that_is_right_is_chosen(family, changes, layout):
    model = tiny(family, **changes)
    assert choose_layout(model) == layout == layout_of(model)
    assert layout_of(copy.deepcopy(model)) == layout_of(skeleton(model)) == layout


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(UserError, match=r"shared: attends in both directions.*padded: its logits"):
        choose_layout(tiny("Bert"))


def test_a_head_that_is_not_the_last_step_is_refused():
    model = tiny("Granite")
    forward = type(model).forward

    def lying(**kwargs):
        output = forward(model, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = lying
    with pytest.raises(UserError, match="own logits"):
        choose_layout(model)


def test_whole_sequences_of_a_tree():
    whole = WholeSequences.of(TREE)
    assert [ids.tolist() for ids in whole.input_ids] == [[11, 12, 13, 14], [11, 12, 13, 15], [16]]
    assert whole.places.tolist() == [0, 1, 2, 3, 7, 8]
    assert whole.packed().position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert whole.padded().tolist() == [[11, 12, 13, 14], [11, 12, 13, 15], [16, 0, 0, 0]]
    assert whole.padded().flatten()[whole.padded_places].equal(TREE.input_ids)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_states_and_gradients_equal_the_shared_ones(layout):
    model, seed = tiny("Qwen3", torch.float64), torch.randn(6, 32, dtype=torch.float64)
    results = []
    for each in ("shared", layout):
        model.rosd_layout = each
        model.zero_grad()
        with float64():
            states = hidden_states(model, TREE)
            (states * seed).sum().backward()
        results.append({"states": states.detach(), **gradients(model)})
    assert_equal(*results)


def running_sum(forward: Any, *, told: bool) -> Any:
    """A layer with a state over the tokens: the sum of the outputs so far.

    told: whether it begins anew at each sequence, as the GPU kernels of linear attention do.
    """

    def summed(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = forward(hidden, **kwargs)
        total = output.cumsum(1)
        index = kwargs.get("seq_idx")
        if index is None or not told:
            return total
        assert kwargs["cu_seq_lens_q"].dtype == index.dtype == torch.int32
        starts = kwargs["cu_seq_lens_q"][:-1].long()
        return total - (total - output)[:, starts[index[0].long()]]

    return summed


@pytest.mark.parametrize(("told", "layout"), [(True, "packed"), (False, "padded")])
def test_layers_with_a_state_are_told_where_sequences_begin(told, layout):
    model = tiny("Llama", torch.float64)
    for block in model.model.layers:
        block.forward = running_sum(block.forward, told=told)
    assert choose_layout(model) == layout


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_padded_micro_batches_have_neighbours(distill_samples, num_ranks):
    samples = distill_samples * 3
    batches = pack(samples, max_tokens=90, padded=True, num_ranks=num_ranks)
    assert len(batches) % num_ranks == 0
    lengths = []
    for batch in batches:
        if not batch.rollout_ids:
            continue
        assert batch.student.parents == (-1,) * len(batch.rollout_ids)
        sides = [side.lengths for side in (batch.student, batch.teacher) if side is not None]
        padded = sum(len(side) * max(side) for side in sides)
        assert padded <= 90 or len(batch.rollout_ids) == 1
        lengths.append((min(batch.student.lengths), max(batch.student.lengths)))
    assert all(first[0] >= second[1] for first, second in pairwise(lengths))
    assert sum(len(batch.rollout_ids) for batch in batches) == len(samples)
