"""Packed sequences through a transformers model: one row of T tokens, no padding, no logits.

`packed_forward` makes every attention layer of a model call `packed_attention`, which attends
within each sequence only. The change is undone on leaving, so a rollout engine can use the same
module between steps. Everything else in a decoder works on single tokens and their position ids, so
the hidden states equal those of processing each sequence alone. `check_packing` verifies that
numerically for the model that is loaded.

A shared prefix is stored once, as a segment that is the parent of others
(`PackedSequences.parents`). Each layer concatenates the keys and values along the path from the
root to a segment, and the segment's queries attend to them, aligned at the last token:

    o_i = attend(q_i, [k_root .. k_i], [v_root .. v_i])

Autograd accumulates the gradients of all child segments into the shared segment's keys and values.

The attention function is registered with transformers' attention interface,
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.utils import import_utils

from rosd_fast.errors import UserError
from rosd_fast.model.head import head, logits
from rosd_fast.types import PackedSequences

PACKED = "rosd_packed"
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the attention layers read about S packed segments; computed once per forward pass.

    lengths: [S] tokens of each segment.
    paths: [S] the segments whose keys a segment attends to, from the root to itself.
    cu_seqlens_q: [S + 1] int32 offsets of each segment's queries, on the model's device.
    cu_seqlens_k: [S + 1] int32 offsets of each segment's keys, concatenated along its path.
    """

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def of(cls, packed: PackedSequences, device: torch.device) -> Layout:
        """The layout of `packed`, with its tensors on `device`."""
        lengths, paths = packed.lengths, packed.paths
        key_lengths = [sum(lengths[index] for index in path) for path in paths]
        cu_seqlens_k = torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32)
        return cls(
            lengths=lengths,
            paths=paths,
            cu_seqlens_q=torch.tensor(packed.cu_seqlens, dtype=torch.int32).to(device),
            cu_seqlens_k=cu_seqlens_k.to(device),
        )

    @property
    def max_lengths(self) -> tuple[int, int]:
        """The largest number of queries of a segment, and of keys."""
        return max(self.lengths), max(
            sum(self.lengths[index] for index in path) for path in self.paths
        )

    def along_paths(self, x: Tensor) -> list[Tensor]:
        """[1, H, T, D] -> for each segment [1, H, tokens on its path, D].

        It uses `split` and `cat` because the backward pass of a slice fills a full [T] gradient per
        segment, and because they sum in a fixed order, unlike an index-add on a GPU.
        """
        parts = x.split(self.lengths, dim=2)
        return [
            parts[path[0]] if len(path) == 1 else torch.cat([parts[i] for i in path], dim=2)
            for path in self.paths
        ]


def hidden_states(model: PreTrainedModel, packed: PackedSequences) -> Tensor:
    """The [T, H] hidden states after the final norm, in the model's dtype and on its device.

    Logits are never computed. Differentiable when grad mode is on.
    """
    with packed_forward(model):
        return decode(model, packed, model.device)[0]


def decode(model: PreTrainedModel, packed: PackedSequences, device: torch.device) -> Tensor:
    """The [1, T, H] states of `hidden_states`; call it within `packed_forward`.

    device: the device to compute on; the weights of a sharded model may be kept on another.
    """
    output = backbone(model)(
        input_ids=packed.input_ids[None].to(device),
        position_ids=packed.position_ids[None].to(device),
        use_cache=False,
        packed_layout=Layout.of(packed, device),
    )
    return output.last_hidden_state


@contextmanager
def packed_forward(model: PreTrainedModel) -> Iterator[None]:
    """Make the model's attention layers attend within packed sequences; undone on leaving (0.2 ms).

    May be nested. Recomputed activations read the setting again, so run the backward pass inside
    the block too. Raises UserError if the model bypasses transformers' attention interface.
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
    packed_layout: Layout | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence: [1, T, Hq, Dv]. transformers calls it.

    Raises UserError for layers whose attention is not supported on packed sequences.
    """
    if packed_layout is None:
        raise UserError(
            "does not pass the packed layout to its attention layers", where=name(module)
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UserError("attention sinks and position biases are not supported", where=name(module))
    if not getattr(module, "is_causal", True):
        raise UserError(
            "attends in both directions, so it is not a causal language model", where=name(module)
        )
    window = sliding_window(module, kwargs)
    keys, values = packed_layout.along_paths(key), packed_layout.along_paths(value)
    if can_flash(query):
        return attend_flash(
            query,
            keys,
            values,
            packed_layout,
            scale=scaling,
            dropout=dropout,
            window=window,
            softcap=softcap,
        ), None
    outputs = [
        attend(q, k, v, scale=scaling, dropout=dropout, window=window, softcap=softcap).transpose(
            1, 2
        )
        for q, k, v in zip(query.split(packed_layout.lengths, dim=2), keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def attend_flash(
    query: Tensor,  # [1, Hq, T, D]
    keys: list[Tensor],  # per segment [1, Hk, tokens on its path, D]
    values: list[Tensor],
    layout: Layout,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of all segments in one variable-length call of flash-attn: [1, T, Hq, D].

    flash-attn aligns the last query with the last key, as segments require.
    """
    max_length_q, max_length_k = layout.max_lengths
    return _flash_attention_forward(
        query.transpose(1, 2),
        torch.cat(keys, dim=2).transpose(1, 2),
        torch.cat(values, dim=2).transpose(1, 2),
        attention_mask=None,
        query_length=query.shape[2],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scale,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=layout.cu_seqlens_q,  # type: ignore[arg-type]
        cu_seq_lens_k=layout.cu_seqlens_k,  # type: ignore[arg-type]
        max_length_q=max_length_q,
        max_length_k=max_length_k,
        attn_implementation=flash_attention(),
    )


def can_flash(query: Tensor) -> bool:
    """Whether an installed flash-attn supports the query's device and dtype."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and flash_attention() is not None
    )


@cache
def flash_attention() -> str | None:
    """The installed flash-attn that suits the GPU, by transformers' name; None: use SDPA."""
    if not torch.cuda.is_available():
        return None
    major, _ = torch.cuda.get_device_capability()
    # Version 3 is written for Hopper and 4 for Blackwell; 2 runs on both.
    for version, suits in ((4, major >= 10), (3, major == 9), (2, major >= 8), (4, major == 9)):
        if suits and getattr(import_utils, f"is_flash_attn_{version}_available")():
            return f"flash_attention_{version}"
    return None


def attend(
    query: Tensor,  # [1, Hq, L, D]
    key: Tensor,  # [1, Hk, M, D], M >= L
    value: Tensor,  # [1, Hk, M, Dv]
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention for the last L of a sequence's M tokens: [1, Hq, L, Dv].

    A token sees itself and the `window - 1` tokens before it (None: all before it).
    """
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if window is not None and key.shape[2] > length + window - 1:
        key, value = (x[:, :, 1 - length - window :] for x in (key, value))
    before, mask = key.shape[2] - length, None
    if softcap is not None or before or (window is not None and length > window):
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(before)
        if window is not None:
            mask = mask.triu(before + 1 - window)
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
    # The softmax is in at least fp32, as in transformers' eager attention.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        value.dtype
    )
    return F.dropout(weights, dropout) @ value


def sliding_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The layer's window in tokens; None: it attends to all tokens before.

    Raises UserError for a sliding layer that does not say its window.
    """
    window = kwargs.get("sliding_window")
    if window is None:
        types = getattr(getattr(module, "config", None), "layer_types", None)
        index = getattr(module, "layer_idx", None)
        if types and index is not None and types[index] != "full_attention":
            raise UserError(f"its {types[index]} layers are not supported", where=name(module))
    return window


def use_exact_attention(model: PreTrainedModel) -> None:
    """Use eager attention for soft-capped models: some transformers versions drop the cap in
    SDPA."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise UserError unless packed hidden states and the head give the model's own logits.

    Three short sequences, two of which share a prefix, are compared with the model's own forward
    pass of each. This refuses what cannot work: layers with a state that crosses sequence borders,
    attention with sinks, other output heads.
    """
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if types - LAYER_TYPES:
        raise UserError(
            f"its {', '.join(sorted(types - LAYER_TYPES))} layers cannot run on packed sequences",
            where=name(model),
            fix="Choose a model whose layers all use full or sliding-window attention",
        )
    lengths = (7, 5, 4, 6)
    ids = (torch.arange(sum(lengths)) * 37 + 11) % num_embeddings(model)
    packed = PackedSequences(
        input_ids=ids,
        position_ids=torch.cat(
            [torch.arange(n) + 7 * (i in (1, 2)) for i, n in enumerate(lengths)]
        ),
        cu_seqlens=(0, *accumulate(lengths)),
        gather=torch.arange(sum(lengths)),
        parents=(-1, 0, 0, -1),
    )
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    states = hidden_states(model, packed).split(lengths)
    for last, segment in zip(packed.cu_seqlens[1:], states, strict=True):
        sequence = torch.tensor([packed.sequence(last - 1)]).to(model.device)
        expected = model(input_ids=sequence, use_cache=False).logits[0, -len(segment) :]
        difference = (logits(segment, head(model)) - expected).norm(dim=-1) / expected.norm(dim=-1)
        # The median, because a router that flips on a rounding error changes one token, not most.
        if not float(difference.median()) <= tolerance:
            raise UserError(
                "packed sequences do not give the model's own logits "
                f"(relative difference {float(difference.median()):.1e})",
                where=name(model),
                fix="Choose a model of another architecture",
            )


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output head. Raises UserError if it cannot be separated."""
    decoder, outer = model, None
    while decoder is not outer and isinstance(decoder, PreTrainedModel):
        outer, decoder = decoder, decoder.get_decoder()  # one that reads images holds a whole model
        if decoder is outer and decoder.get_output_embeddings() is not None:
            decoder = getattr(decoder, "model", decoder)
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        raise UserError("is not a language model with a head on a decoder", where=name(model))
    return decoder


def num_embeddings(model: PreTrainedModel) -> int:
    """The number of token ids that the model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def name(module: nn.Module) -> str:
    """The module's class, for error messages."""
    return type(module).__name__


AttentionInterface.register(PACKED, packed_attention)
