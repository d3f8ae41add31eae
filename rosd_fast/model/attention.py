"""Packed sequences through a transformers model: one row of T tokens, no padding, no logits.

`packed_forward` makes every attention layer of a model call `packed_attention`, which attends
within each sequence of `cu_seqlens` only. The switch is undone on leaving, so that a rollout engine
can use the very same module in between. Position ids restart at 0 in each sequence; everything else
in a decoder works on single tokens, so the hidden states are those of one sequence at a time.
`check_packing` verifies that for the model at hand, by numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from rosd_fast.errors import UserError
from rosd_fast.types import PackedSequences

PACKED = "rosd_packed"
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last step of a language model: logits = cap(scale * (h @ weight.T + bias)).

    cap(x) = softcap * tanh(x / softcap), or x when softcap is None. Gradients flow to the live
    parameters.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    def logprobs(self, states: Tensor) -> Tensor:
        """[N, V] float32 log-probabilities at temperature 1, of a few states [N, H]."""
        logits = F.linear(states, self.weight, self.bias).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(-1)


def hidden_states(model: PreTrainedModel, packed: PackedSequences) -> Tensor:
    """Hidden states [T, H] after the final norm, in the model's dtype and on its device.

    The logits are never computed. Differentiable when grad mode is on.
    """
    device = model.device
    with packed_forward(model):
        output = backbone(model)(
            input_ids=packed.input_ids[None].to(device),
            position_ids=packed.position_ids[None].to(device),
            use_cache=False,
            packed_lengths=sequence_lengths(packed.cu_seqlens),
        )
    return output.last_hidden_state[0]


def head(model: PreTrainedModel) -> Head:
    """The model's output head. Raises UserError when it has none."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            "has no linear output head, so it is no causal language model", where=name(model)
        )
    config = model.config.get_text_config()
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        # Cohere multiplies its logits, Granite divides them.
        scale=(getattr(config, "logit_scale", None) or 1.0)
        / (getattr(config, "logits_scaling", None) or 1.0),
    )


@contextmanager
def packed_forward(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention layers attend within packed sequences; undone on leaving (0.2 ms).

    May be nested. Recomputed activations read the setting again, so keep a backward pass inside
    too.
    """
    before = model.config._attn_implementation or "eager"
    if before == PACKED:
        yield
        return
    model.set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        raise UserError(
            "its attention layers do not use transformers' attention interface",
            where=name(model),
            fix="Choose a model of another architecture",
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hk, T, D], Hq a multiple of Hk
    value: Tensor,  # [1, Hk, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_lengths: tuple[int, ...] | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence: [1, T, Hq, Dv]. Called by transformers.

    `split` and `cat` rather than slices: a slice's backward fills a whole [T] gradient for each
    sequence, which makes the backward quadratic in the number of sequences.
    """
    if packed_lengths is None:
        raise UserError(
            "does not hand the packed lengths to its attention layers", where=name(module)
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UserError("attention sinks and position biases are not supported", where=name(module))
    if not getattr(module, "is_causal", True):
        raise UserError(
            "attends in both directions, so it is no causal language model", where=name(module)
        )
    window = sliding_window(module, kwargs)
    outputs = [
        attend(q, k, v, scale=scaling, dropout=dropout, window=window, softcap=softcap).transpose(
            1, 2
        )
        for q, k, v in zip(
            *(x.split(packed_lengths, dim=2) for x in (query, key, value)), strict=True
        )
    ]
    return torch.cat(outputs, dim=1), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of one sequence of L tokens: [1, Hq, L, Dv].

    A token sees itself and the `window - 1` tokens before it (None: all before it).
    """
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if softcap is not None or (window is not None and length > window):
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
    assert mask is not None
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    # Softmax in at least fp32, as transformers' eager attention does.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        value.dtype
    )
    return F.dropout(weights, dropout) @ value


def sliding_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window the layer asks for; a sliding layer that does not say its window is refused."""
    window = kwargs.get("sliding_window")
    if window is None:
        types = getattr(getattr(module, "config", None), "layer_types", None)
        index = getattr(module, "layer_idx", None)
        if types and index is not None and types[index] != "full_attention":
            raise UserError(f"its {types[index]} layers are not supported", where=name(module))
    return window


def sequence_lengths(cu_seqlens: tuple[int, ...]) -> tuple[int, ...]:
    """(0, 3, 5) -> (3, 2)"""
    return tuple(end - start for start, end in pairwise(cu_seqlens))


def use_exact_attention(model: PreTrainedModel) -> None:
    """Run soft-capped attention in eager mode: SDPA of some transformers versions drops the cap."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise UserError unless packed hidden states and the head give the model's own logits.

    Two short sequences, packed, against the model's own forward of each. This refuses what cannot
    work: layers with a state that runs over sequence borders, attention with sinks, other output
    heads.
    """
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if types - LAYER_TYPES:
        raise UserError(
            f"its {', '.join(sorted(types - LAYER_TYPES))} layers cannot run on packed sequences",
            where=name(model),
            fix="Choose a model whose layers all use full or sliding-window attention",
        )
    lengths = (7, 5)
    ids = (torch.arange(sum(lengths)) * 37 + 11) % num_embeddings(model)
    packed = PackedSequences(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=(0, lengths[0], sum(lengths)),
        gather=torch.arange(sum(lengths)),
    )
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    states = hidden_states(model, packed).split(lengths)
    for sequence, own in zip(ids.split(lengths), states, strict=True):
        expected = model(input_ids=sequence[None].to(model.device), use_cache=False).logits[0]
        difference = (logits(own, head(model)) - expected).norm(dim=-1) / expected.norm(dim=-1)
        # The median: a router that flips on a rounding error may change one token, not most of
        # them.
        if not float(difference.median()) <= tolerance:
            raise UserError(
                "packed sequences do not give the model's own logits "
                f"(relative difference {float(difference.median()):.1e})",
                where=name(model),
                fix="Choose a model of another architecture",
            )


def logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits [N, V] of hidden states [N, H]: for checks and tests, never for training."""
    values = F.linear(hidden, head.weight, head.bias) * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output head."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        raise UserError("is no language model with a head on a decoder", where=name(model))
    return decoder


def num_embeddings(model: PreTrainedModel) -> int:
    """Token ids the model can read."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def name(module: nn.Module) -> str:
    return type(module).__name__


AttentionInterface.register(PACKED, packed_attention)
