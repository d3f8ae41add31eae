"""A family of models as a change to `tests.tiny.SHAPE`, and changes that several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.tiny import SHAPE

SLIDING: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
NUM_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
NO_HEAD_DIM: dict[str, Any] = {"head_dim": None}
# For configs with names of their own.
OWN_SHAPE: dict[str, Any] = dict.fromkeys(SHAPE) | {"vocab_size": SHAPE["vocab_size"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models.

    config: transformers' config class, without "Config".
    known: the models that people know it by.
    changes: to `SHAPE`; None leaves a name out.
    """

    config: str
    known: str
    changes: dict[str, Any]


def family(config: str, known: str, /, **changes: Any) -> Family:
    """A family with its changes as keyword arguments."""
    return Family(config=config, known=known, changes=changes)
