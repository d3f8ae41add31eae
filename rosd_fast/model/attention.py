"""Attention of packed sequences: one row of T tokens, no padding.

`rosd_fast.model.layouts` makes every attention layer of a model call `packed_attention`, which
attends within each sequence only. Everything else in a decoder works on single tokens and their
position ids, so the hidden states equal those of processing each sequence alone.

A shared prefix is stored once, as a segment that is the parent of others
(`PackedSequences.parents`). Each layer concatenates the keys and values along the path from the
root to a segment, and the segment's queries attend to them, aligned at the last token:

    o_i = attend(q_i, [k_root .. k_i], [v_root .. v_i])

Autograd accumulates the gradients of all child segments into the shared segment's keys and values.

The attention function is registered with transformers' attention interface,
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from rosd_fast.errors import UserError
from rosd_fast.model.flash import attend_flash, can_flash
from rosd_fast.model.sdpa import Rule, attend
from rosd_fast.types import PackedSequences
from rosd_fast.utils.transfer import on_device

PACKED = "rosd_packed"
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
STATE_TYPES = {"linear_attention", "mamba", "conv", "hybrid"}  # layers with a state over the tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
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
    def of(cls, packed: PackedSequences, device: torch.device) -> Segments:
        """The segments of `packed`, with tensors on `device`."""
        lengths, paths = packed.lengths, packed.paths
        key_lengths = [sum(lengths[index] for index in path) for path in paths]
        cu_seqlens_q = torch.tensor(packed.cu_seqlens, dtype=torch.int32)
        cu_seqlens_k = torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32)
        return cls(
            lengths=lengths,
            paths=paths,
            cu_seqlens_q=on_device(cu_seqlens_q, device),
            cu_seqlens_k=on_device(cu_seqlens_k, device),
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


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hk, T, D], Hq a multiple of Hk
    value: Tensor,  # [1, Hk, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_segments: Segments | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence: [1, T, Hq, Dv]. transformers calls it.

    Raises UserError for layers whose attention is not supported on packed sequences.
    """
    if packed_segments is None:
        raise UserError(
            "does not pass the packed segments to its attention layers", where=name(module)
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise UserError("its layers have masks or position biases of their own", where=name(module))
    if not getattr(module, "is_causal", True):
        raise UserError(
            "attends in both directions, so it is not a causal language model", where=name(module)
        )
    rule = Rule(
        scale=scaling,
        dropout=dropout,
        window=sliding_window(module, kwargs),
        chunk=chunk_size(module),
        softcap=softcap,
        sinks=kwargs.get("s_aux"),
    )
    keys, values = packed_segments.along_paths(key), packed_segments.along_paths(value)
    if can_flash(query, rule):
        return attend_flash(query, keys, values, packed_segments, rule), None
    outputs = [
        attend(q, k, v, rule).transpose(1, 2)
        for q, k, v in zip(query.split(packed_segments.lengths, dim=2), keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def sliding_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The layer's window in tokens; None: it attends to all tokens before.

    Raises UserError for a sliding layer that does not say its window.
    """
    window = kwargs.get("sliding_window")
    if window is None and layer_type(module) == "sliding_attention":
        raise UserError("its sliding layers do not say their window", where=name(module))
    return window


def chunk_size(module: nn.Module) -> int | None:
    """The number of tokens of a layer's chunks; None: it has no chunks."""
    if layer_type(module) != "chunked_attention":
        return None
    return int(getattr(module, "config").attention_chunk_size)  # noqa: B009


def layer_type(module: nn.Module) -> str | None:
    """The type of an attention layer by the config; None: the config has none."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types and index is not None else None


def check_config(model: PreTrainedModel, *, by_state: bool) -> None:
    """Raise UserError if the config names what packed sequences cannot pass.

    A check by numbers has short sequences, in which a layer of another kind may look like one that
    attends to everything.

    by_state: whether layers with a state over the tokens are told where a sequence begins.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4, beyond 8,192 tokens
        raise UserError(
            "its attention is scaled by the row in the batch, not by the position",
            where=name(model),
        )
    types = set(getattr(config, "layer_types", None) or ())
    known = LAYER_TYPES | STATE_TYPES if by_state else LAYER_TYPES
    if types - known:
        raise UserError(
            f"its {', '.join(sorted(types - known))} layers cannot run on packed sequences",
            where=name(model),
        )


def use_exact_attention(model: PreTrainedModel) -> None:
    """Use eager attention for soft-capped models: some transformers versions drop the cap in
    SDPA."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output head. Raises UserError if it cannot be separated."""
    decoder: object = model
    while isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        inner = decoder.get_decoder()
        # Some name it otherwise than their class says, and one that reads images holds a whole
        # language model.
        decoder = inner if inner is not decoder else getattr(decoder, "model", None)
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
