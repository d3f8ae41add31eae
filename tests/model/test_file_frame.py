"""The tensors of files, made bucket by bucket, are those that are made from the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rosd_fast.config import Config
from rosd_fast.model.adapter_files import adapter_weights
from rosd_fast.model.adapters import merged_weights
from rosd_fast.model.file_frame import FileFrame
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.release import filled, places, release_parameters
from rosd_fast.model.weight_stream import TensorSpec, distinct
from tests.families import FAMILIES as ALL
from tests.model.test_file_layout import FAMILIES
from tests.tiny import mark_trainable, tiny_model

CASES = {name: changes for name, (changes, _) in FAMILIES.items()} | {
    "Qwen3_5Text": ALL["Qwen3_5"].changes,
    "Granite": {"tie_word_embeddings": False},
    "Phi": {},
}


def model_of(family: str, lora: bool) -> Any:
    model = tiny_model(family, torch.float32, **CASES[family])
    if lora:
        mark_trainable(model, Config.model_validate({"lora": {"rank": 2}}))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", CASES)
def test_buckets_make_the_tensors_of_the_whole_model(family: str, lora: bool) -> None:
    model = model_of(family, lora)
    expected = distinct(file_weights(model, merged_weights(model)))
    parameters = dict(model.named_parameters())
    for limit in (1, 20_000, 10**9):
        frame = FileFrame(model, bucket_bytes=limit)
        assert list(frame.specs) == list(expected)
        assert frame.specs == {name: TensorSpec.of(t) for name, t in expected.items()}
        made: dict[str, Tensor] = {}
        for bucket in frame.buckets:
            tensors = frame.tensors(bucket, {name: parameters[name] for name in bucket.parameters})
            size = sum(t.nbytes for t in tensors.values())
            assert len(bucket.units) == 1 or size <= limit
            assert not made.keys() & tensors.keys()
            made |= tensors
        assert made.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype, name
        assert (len(frame.buckets) == 1) == (limit == 10**9)
    given = {name: parameters[name] for name in frame.adapters}
    ours, theirs = frame.adapter_weights(given), adapter_weights(model)
    assert ours.keys() == theirs.keys() and bool(ours) == lora
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_transformers_merges_stays_together() -> None:
    """A dense model's tensors are alone; a layer whose files need several of its tensors is not."""
    dense = FileFrame(model_of("Llama", False), bucket_bytes=1)
    assert len(dense.buckets) == len(dense.specs)
    for bucket in dense.buckets:
        assert len(bucket.parameters) == 1
    fused = FileFrame(model_of("Qwen3Moe", False), bucket_bytes=1)
    assert len(fused.buckets) < len(fused.specs)


def test_tied_weights_are_one_unit() -> None:
    frame = FileFrame(model_of("Llama", False), bucket_bytes=1)
    assert "lm_head.weight" not in frame.specs
    (unit,) = [b.units[0] for b in frame.buckets if "lm_head.weight" in b.units[0]]
    assert set(unit) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_frame_holds_nothing_of_a_bucket() -> None:
    model = model_of("Llama", False)
    frame = FileFrame(model, bucket_bytes=1)
    parameters = dict(model.named_parameters())
    given = {name: parameters[name].detach().clone() for name in frame.buckets[0].parameters}
    left = [StorageWeakRef(t.untyped_storage()) for t in given.values()]
    tensors = frame.tensors(frame.buckets[0], given)
    assert tensors
    del given, tensors
    assert all(ref.expired() for ref in left)


def test_parameters_are_filled_for_a_block() -> None:
    model = tiny_model("Llama", torch.float32, tie_word_embeddings=True)
    release_parameters(model)
    before = dict(model.named_parameters())
    value = torch.ones(64, 32)
    with filled(places(model), {"model.embed_tokens.weight": value}):
        assert model.lm_head.weight.data_ptr() == value.data_ptr()
    assert dict(model.named_parameters()) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_meta
