"""Weights by the names and in the shapes of files: experts one by one, tied weights once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosd_fast.config import Config
from rosd_fast.model.adapters import merged_weights
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.load import load_weights
from rosd_fast.model.weight_stream import distinct
from tests.tiny import mark_trainable, tiny_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# By family: changes to its config, and a name that only its files have.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": ({"tie_word_embeddings": True}, ""),
    "Qwen3Moe": (EXPERTS, "model.layers.1.mlp.experts.3.gate_proj.weight"),
    "Qwen2Moe": (EXPERTS, "model.layers.1.mlp.experts.3.down_proj.weight"),
    "Mixtral": (LOCAL, "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
    "GptOss": (LOCAL, ""),  # fused in its files, too
    "GraniteMoe": (LOCAL, "model.layers.1.block_sparse_moe.input_linear.weight"),
    "GPTNeoX": ({}, "embed_out.weight"),
}


def saved(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Save a model of the family; returns what its files hold."""
    tiny_model(family, torch.float32, **FAMILIES[family][0]).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def loaded(folder: Path) -> Any:
    return load_weights(folder, dtype=torch.float32, trust_remote_code=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_that_of_the_files(tmp_path: Path, family: str) -> None:
    """Of a model that files were loaded into, and of one that has seen none."""
    files = saved(tmp_path, family)
    assert not FAMILIES[family][1] or FAMILIES[family][1] in files
    for model in (loaded(tmp_path), tiny_model(family, torch.float32, **FAMILIES[family][0])):
        weights = file_weights(model, model.state_dict())
        assert weights.keys() == files.keys()
        assert all(torch.equal(weights[name], files[name]) for name in files)
        assert distinct(weights).keys() == files.keys()


def test_only_fused_weights_are_copied(tmp_path: Path) -> None:
    saved(tmp_path, "Qwen3Moe")
    model = loaded(tmp_path)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = file_weights(model, model.state_dict())
    copied = {n for n, w in weights.items() if w.untyped_storage().data_ptr() not in storages}
    assert all(".experts." in name for name in copied)


def test_adapters_of_experts_are_merged(tmp_path: Path) -> None:
    """The model that files with the merged weights give computes what the adapted one does."""
    saved(tmp_path / "before", "Qwen3Moe")
    model, plain = loaded(tmp_path / "before"), loaded(tmp_path / "before")
    mark_trainable(model, Config.model_validate({"lora": {"rank": 2}}))
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    weights = merged_weights(model)
    assert weights.keys() == plain.state_dict().keys()
    changed = {name for name in weights if not torch.equal(weights[name], plain.state_dict()[name])}
    assert {name.split(".", 3)[3] for name in changed if "experts" in name} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    plain.load_state_dict(weights)
    plain.save_pretrained(tmp_path / "after")
    files = load_file(tmp_path / "after" / "model.safetensors")
    ours = file_weights(model, weights)
    assert ours.keys() == files.keys()
    assert all(torch.equal(ours[name], files[name]) for name in files)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    ids = torch.arange(3, 14)[None]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)


def test_router_logits_are_off(tmp_path: Path) -> None:
    model = tiny_model("Mixtral", torch.float32, **LOCAL, output_router_logits=True)
    model.save_pretrained(tmp_path)
    assert not loaded(tmp_path).config.output_router_logits
