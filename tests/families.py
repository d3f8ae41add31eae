"""Tiny random models of the causal language model families of transformers.

`FAMILIES` maps a name to the config that makes the family's smallest model in which each kind of
its layers occurs. `tiny(name)` is that model. A family that the installed transformers lacks is not
in `names()`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from rosd_fast.model.attention import use_exact_attention
from tests.family_tables.dense import DENSE
from tests.family_tables.experts import EXPERTS
from tests.family_tables.family import Family
from tests.family_tables.recurrent import RECURRENT
from tests.tiny import SHAPE

FAMILIES: dict[str, Family] = {
    name: (DENSE | EXPERTS | RECURRENT)[name]
    for name in sorted([*DENSE, *EXPERTS, *RECURRENT], key=str.lower)
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Parameters of recurrent layers: rates, gates and time steps, whose own initial values keep a state
# from exploding.
OWN_INIT = (
    *("A_log", "dt_bias", "dt_proj", ".D", "time_decay", "time_first", "time_mix"),
    *("recurrent_param", "input_gate", "recurrent_gate", "igate_preact", "fgate_preact"),
)


FAULTY = {"Doge": "5.23"}  # in earlier versions its tokens see later ones


def names() -> list[str]:
    """The families that the installed transformers has and computes right."""
    version = Version(transformers.__version__)
    return [
        name
        for name, family in FAMILIES.items()
        if hasattr(transformers, f"{family.config}Config")
        and version >= Version(FAULTY.get(name, "0"))
    ]


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of the family's tiny model. changes: to it."""
    family = FAMILIES[name]
    options = SHAPE | IDS | copy.deepcopy(family.changes) | changes
    config = getattr(transformers, f"{family.config}Config")
    return config(**{key: value for key, value in options.items() if value is not None})


def tiny(name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of the family in eval mode: equal weights for equal seeds.

    The weights are so large that attention is not uniform. changes: to its config.
    """
    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
        for key, parameter in model.named_parameters():
            if not any(part in key for part in OWN_INIT):
                nn.init.normal_(parameter, std=0.25)
    model.to(dtype)
    if dtype == torch.float64:  # grouped products of experts are for narrower dtypes only
        model.set_experts_implementation("eager")
    use_exact_attention(model)
    return model
