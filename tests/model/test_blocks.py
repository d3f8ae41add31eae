"""Blocks with activation checkpointing or liger-kernel."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.model.blocks import blocks, describe, prepare_blocks
from rosd_fast.trainer.learner import Learner
from tests.tiny import mark_trainable

FAMILIES = ["Llama", "Qwen3", "Mistral", "Gemma3Text", "Granite"]


def steps(model: Any, samples: Any, **learner: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The metrics of two steps and the weights after them."""
    options = Config.model_validate(
        {"learner": learner, "optim": {"lr": 1e-3}, "loss": {"strategy": "reference"}}
    )
    own = Learner(model, options)
    batches = pack(samples, max_tokens=60, min_shared=2)
    return [own.step(batches).metrics for _ in range(2)], own.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_are_the_same(make_model, distill_samples, family) -> None:
    kept = steps(make_model(family), distill_samples)
    recomputed = steps(make_model(family), distill_samples, activation_checkpointing=True)
    assert recomputed[0] == kept[0]
    assert all(torch.equal(recomputed[1][name], weight) for name, weight in kept[1].items())


def test_activation_checkpointing_keeps_fewer_bytes(make_model, distill_samples) -> None:
    """Compare the bytes that autograd has saved by the end of the forward pass."""
    sizes = []
    for recompute in (False, True):
        model = make_model("Llama", torch.float32, num_hidden_layers=6)
        options = Config.model_validate({"learner": {"activation_checkpointing": recompute}})
        prepare_blocks(model, options.learner, torch.device("cpu"))
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(torch.arange(1, 60)[None])
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes.append(sum(size for pointer, size in saved.items() if pointer not in weights))
        del output
    assert sizes[1] < sizes[0] / 2


PATCHED = """
import torch, transformers
from rosd_fast.model.blocks import use_liger
from rosd_fast.model.other_parts import take_out
from tests import image_text
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
for family in FAMILIES:
    config = getattr(transformers, family + "Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    forward = type(model).forward
    use_liger(model)
    for module in model.modules():
        own = getattr(module.forward, "__func__", module.forward)
        if "liger" in own.__module__:
            print(family, type(module).__name__)
    print(family, "own loss" if type(model).forward is forward else "liger loss")
for family in image_text.FAMILIES:
    model = image_text.image_text_model(family)
    take_out(model)
    use_liger(model)
    forwards = [getattr(m.forward, "__func__", m.forward) for m in model.modules()]
    liger = any("liger" in forward.__module__ for forward in forwards)
    print("image-text", family, "liger" if liger else "own")
"""


def test_liger_takes_norms_and_mlps() -> None:
    """The kernels need a GPU, but not the check of which modules get them. It runs in a process of
    its own, because it changes transformers' modules."""
    pytest.importorskip("liger_kernel")
    code = PATCHED.replace("in FAMILIES", f"in {FAMILIES}")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = set(run.stdout.splitlines())
    for family in FAMILIES:
        assert any(line.startswith(family) and line.endswith("RMSNorm") for line in found), family
        assert any(line.startswith(family) and line.endswith("MLP") for line in found), family
        assert f"{family} own loss" in found
    assert {"image-text Gemma3 liger", "image-text Mistral3 liger"} <= found


def test_liger_is_off_on_a_cpu_and_refused_if_required(make_model) -> None:
    model = make_model()
    prepare_blocks(model, Config().learner, torch.device("cpu"))
    assert all("forward" not in vars(module) for module in model.modules())
    options = Config.model_validate({"learner": {"liger": "on"}}).learner
    with pytest.raises(UserError, match=r"learner\.liger.*GPU|GPU.*learner\.liger"):
        prepare_blocks(model, options, torch.device("cpu"))


def test_describe(make_model) -> None:
    options = Config.model_validate(
        {
            "device": "cpu",
            "dtype": "bfloat16",
            "learner": {"activation_checkpointing": True},
            "optim": {"trainable": "model.norm.weight"},
        }
    )
    model = make_model("Llama", torch.bfloat16)
    mark_trainable(model, options)
    total = sum(p.numel() for p in model.parameters())
    assert describe(
        model,
        options.learner,
        dtype="bfloat16",
        device=torch.device("cpu"),
        num_ranks=4,
    ) == (
        f"LlamaForCausalLM, 32 of {total:,} weights trained in bfloat16, 4 ranks on cpu, "
        "attention sdpa, packed, prefixes shared, activations recomputed"
    )
    assert len(list(blocks(model))) == 2
