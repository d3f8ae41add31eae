"""Linear layers of 4 bits below adapters: everything is that of the dequantized model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.engines.factory import model_folder
from rosd_fast.errors import UserError
from rosd_fast.memory_plan import ModelShape, memory_plan
from rosd_fast.model import nf4
from rosd_fast.model.adapters import base_weights, fingerprint, merged_weights
from rosd_fast.model.blocks import describe
from rosd_fast.model.export import export_model
from rosd_fast.model.load import load_model
from rosd_fast.model.nf4 import check_quantize, has_packed, linear_layers, quantize_linear
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.snapshot import Export
from tests.tiny import mark_trainable, tiny_model

needs_bitsandbytes = pytest.mark.skipif(
    nf4.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
OPTIONS: dict[str, Any] = {
    "lora": {"rank": 4, "quantize": "nf4"},
    "optim": {"lr": 1e-2},
    "loss": {"strategy": "reference"},
}
CPU = torch.device("cpu")


def packed_model(family: str = "Llama", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, dtype)
    quantize_linear(model, CPU)
    return model


def plain_model(packed: Any) -> Any:
    """The same model with dequantized weights."""
    model = tiny_model(type(packed).__name__.removesuffix("ForCausalLM"), packed.dtype)
    model.load_state_dict(base_weights(packed))
    return model


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Mixtral"])
def test_logits_are_those_of_the_dequantized_weights(family: str, dtype: torch.dtype) -> None:
    model = packed_model(family, dtype)
    names = [name for name, _ in linear_layers(tiny_model(family))]
    assert names
    assert "lm_head" not in names
    assert all(type(model.get_submodule(name)).__name__ == "Linear4bit" for name in names)
    original = tiny_model(family, dtype)
    plain = plain_model(model)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(before, plain(ids).logits)
        assert not torch.allclose(before, original(ids).logits, atol=1e-3)
        model(ids)
    # Inference has not repacked the weights, as bitsandbytes does on some CPUs.
    assert all(torch.equal(w, plain.state_dict()[n]) for n, w in base_weights(model).items())
    assert torch.equal(copy.deepcopy(model)(ids).logits, before)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["frozen", "ema", "live"])
def test_steps_are_those_of_adapters_on_the_dequantized_model(distill_samples, kind) -> None:
    config = Config.model_validate({**OPTIONS, "teacher": {"kind": kind}})
    results = []
    model = packed_model()
    for own in (plain_model(model), model):
        mark_trainable(own, config)
        learner = Learner(own, config)
        batches = pack(distill_samples, max_tokens=60, min_shared=2)
        metrics = [learner.step(batches).metrics for _ in range(3)]
        results.append((metrics, learner.weights))
    for ours, theirs in zip(results[1][0], results[0][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert results[1][1].keys() == results[0][1].keys()
    for name, weight in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], weight, rtol=0, atol=1e-6)
    changed = [n for n, w in base_weights(model).items() if not torch.equal(w, results[1][1][n])]
    assert len(changed) == len([*linear_layers(tiny_model("Llama"))])


@needs_bitsandbytes
def test_export_and_server_folder_are_the_dequantized_model(tmp_path: Path) -> None:
    loaded = load_model("quickstart", dtype="bfloat16", device=CPU, quantize=True)
    assert has_packed(loaded.model)
    config = Config.model_validate({**OPTIONS, "dtype": "bfloat16"})
    mark_trainable(loaded.model, config)
    learner = Learner(loaded.model, config)
    Export.of(learner, loaded.tokenizer).save(tmp_path / "export")
    folder = model_folder("quickstart", loaded, tmp_path)
    for path in (tmp_path / "export", folder):
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        ids = torch.arange(5, 25)[None]
        assert torch.equal(plain(ids).logits, loaded.model(ids).logits), path
        assert "quantization" not in (path / "config.json").read_text()
    assert (tmp_path / "export" / "adapter" / "adapter_model.safetensors").exists()
    again = load_model("quickstart", dtype="bfloat16", device=CPU, quantize=True)
    assert fingerprint(again.model) == learner.fingerprint


@needs_bitsandbytes
def test_what_is_said_of_it() -> None:
    config = Config.model_validate({**OPTIONS, "dtype": "bfloat16"})
    model, plain = packed_model(dtype=torch.bfloat16), tiny_model("Llama", torch.bfloat16)
    line = describe(model, config.learner, dtype="bfloat16", device=CPU, num_ranks=1)
    assert "linear layers in 4 bits" in line
    total = sum(parameter.numel() for parameter in plain.parameters())
    assert f"of {total:,} weights" in line


def test_memory_plan_counts_packed_weights() -> None:
    config = Config.model_validate({**OPTIONS, "dtype": "bfloat16"})
    model = tiny_model("Llama", torch.bfloat16)
    mark_trainable(model, config)
    shape = ModelShape.of(model)
    linear = sum(layer.weight.numel() for _, layer in linear_layers(tiny_model("Llama")))
    assert shape.linear == linear
    sizes = [
        next(row.size for row in memory_plan(shape, own).rows if row.what == "weights")
        for own in (config, config.model_copy(update={"lora": Config().lora}))
    ]
    assert sizes[1] - sizes[0] == int(linear * (2 - 0.5625))


def test_a_router_is_not_packed() -> None:
    found = {name for name, _ in linear_layers(tiny_model("Mixtral", num_local_experts=2))}
    assert found
    assert not any("gate" in name for name in found)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = Config.model_validate(OPTIONS).lora
    with pytest.raises(UserError, match=r"cannot be sharded.*lora\.quantize|lora\.quantize.*shard"):
        check_quantize(lora, several_ranks=True)
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*rosd-fast\[qlora\]"):
        check_quantize(lora, several_ranks=False)
    check_quantize(Config().lora, several_ranks=True)
    with pytest.raises(ValueError, match=r"needs lora\.rank"):
        Config.model_validate({"lora": {"quantize": "nf4"}})


def test_an_exported_model_has_no_adapters(tmp_path: Path) -> None:
    """Servers that need a copy of a model start from the model itself."""
    loaded = load_model("quickstart", dtype="float32", device=CPU)
    mark_trainable(loaded.model, Config.model_validate({"lora": {"rank": 2}}))
    folder = tmp_path / "copy"
    export_model(loaded.model, loaded.tokenizer, folder)
    copied = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    original = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).state_dict()
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[name], original[name]) for name in original)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(loaded.tokenizer)
    assert merged_weights(loaded.model).keys() == original.keys()
