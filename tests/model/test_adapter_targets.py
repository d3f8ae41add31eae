"""Linear layers that cannot have an adapter."""

from __future__ import annotations

import re

import pytest

from rosd_fast.config import LoraConfig
from rosd_fast.errors import UserError
from rosd_fast.model.adapter_targets import without_adapter
from rosd_fast.model.adapters import choose_trainable
from tests.families import tiny


def adapted(family: str, targets: str = "all-linear") -> set[str]:
    """The last names of the layers that get an adapter."""
    model = tiny(family)
    choose_trainable(model, lora=LoraConfig(rank=2, targets=targets), trainable="", seed=0)
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {name.rsplit(".", 1)[1] for name in layers}


def test_a_plain_model_has_none():
    assert without_adapter(tiny("Llama")) == {}
    assert without_adapter(tiny("Qwen3Next")) == {}


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("Mamba", {"in_proj", "x_proj"}),
        ("Mamba2", {"in_proj"}),
        ("Llama4", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("Zamba", {"in_proj", "linear"}),  # the attention of its layers is one, shared by all
    ],
)
def test_all_linear_leaves_them_out(family, layers):
    assert adapted(family) == layers


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("Jamba", "dt_proj", "mamba.dt_proj is read by the kernels of a Mamba block"),
        ("Llama4", "router", "router chooses experts or tokens"),
        ("Zamba", "q_proj", "q_proj has a weight that several layers share"),
    ],
)
def test_naming_one_is_refused(family, targets, message):
    with pytest.raises(UserError, match=re.escape(message)):
        adapted(family, targets)
