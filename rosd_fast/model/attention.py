"""Attention of packed sequences: one row of T tokens, no padding.

`rosd_fast.model.layouts` makes every attention layer of a model call `packed_attention`, which
attends within each sequence only. Everything else in a decoder works on single tokens and their
position ids, so the hidden states equal those of processing each sequence alone.

A shared prefix is stored once, as a segment that is the parent of others
(`PackedSequences.parents`). Each layer concatenates the keys and values along the path from the
root to a segment, and the segment's queries attend to them, aligned at the last token:

    o_i = attend(q_i, [k_root .. k_i], [v_root .. v_i])

Autograd accumulates the gradients of all child segments into the shared segment's keys and values.

An attention sink s of a head is one more score, without a key and a value (GPT-OSS):

    o_i = sum_j exp(q_i k_j) v_j / (exp(s) + sum_j exp(q_i k_j))

The attention function is registered with transformers' attention interface,
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

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
from rosd_fast.types import PackedSequences

PACKED = "rosd_packed"
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
STATE_TYPES = {"linear_attention", "mamba", "conv", "hybrid"}  # layers with a state over the tokens
MAX_SCORES = 2**26  # elements of a mask or of scores that are held at once


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a layer attends.

    scale: of the scores; None: the head size to the power of -1/2.
    dropout: probability of the weights.
    window: a token sees itself and the `window - 1` tokens before it; None: all before it.
    chunk: a token sees the tokens of its own chunk of so many, counted from the sequence's
        beginning; None: all.
    softcap: c of c tanh(score / c); None: no cap.
    sinks: [Hq] a score without a value for each head; None: no sinks.
    """

    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def first_key(self, query: int) -> int:
        """The first key that the query at this position sees."""
        first = 0 if self.window is None else max(0, query + 1 - self.window)
        return first if self.chunk is None else max(first, query // self.chunk * self.chunk)

    def visible(self, queries: range, keys: range, device: torch.device) -> Tensor | None:
        """[len(queries), len(keys)] bool, for positions in a sequence; None: each query sees all
        keys up to its own, which is the last for the last query."""
        first = self.first_key(queries[-1])
        if first <= keys.start and len(queries) == len(keys):
            return None
        own = torch.arange(queries.start, queries.stop, device=device)[:, None]
        other = torch.arange(keys.start, keys.stop, device=device)
        visible = other <= own
        if self.window is not None:
            visible &= other > own - self.window
        if self.chunk is not None:
            visible &= other // self.chunk == own // self.chunk
        return visible


def attend_flash(
    query: Tensor,  # [1, Hq, T, D]
    keys: list[Tensor],  # per segment [1, Hk, tokens on its path, D]
    values: list[Tensor],
    segments: Segments,
    rule: Rule,
) -> Tensor:
    """Attention of all segments in one variable-length call of flash-attn: [1, T, Hq, D].

    flash-attn aligns the last query with the last key, as segments require.
    """
    max_length_q, max_length_k = segments.max_lengths
    return _flash_attention_forward(
        query.transpose(1, 2),
        torch.cat(keys, dim=2).transpose(1, 2),
        torch.cat(values, dim=2).transpose(1, 2),
        attention_mask=None,
        query_length=query.shape[2],
        is_causal=True,
        dropout=rule.dropout,
        softmax_scale=rule.scale,
        sliding_window=rule.window,
        softcap=rule.softcap,
        cu_seq_lens_q=segments.cu_seqlens_q,  # type: ignore[arg-type]
        cu_seq_lens_k=segments.cu_seqlens_k,  # type: ignore[arg-type]
        max_length_q=max_length_q,
        max_length_k=max_length_k,
        attn_implementation=flash_attention(),
    )


def can_flash(query: Tensor, rule: Rule) -> bool:
    """Whether an installed flash-attn supports the query's device and dtype, and the rule.

    Its kernels have no chunks. Sinks would need the gradient of its log-sum-exp, which it drops.
    """
    return (
        query.is_cuda
        and rule.chunk is None
        and rule.sinks is None
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
    rule: Rule,
) -> Tensor:
    """Attention for the last L of a sequence's M tokens: [1, Hq, L, Dv].

    Queries are taken in blocks where scores are held, so that their memory is bounded.
    """
    num_heads, length, before = query.shape[1], query.shape[2], key.shape[2] - query.shape[2]
    held = rule.softcap is not None or rule.sinks is not None
    size = max(1, MAX_SCORES // (num_heads * key.shape[2])) if held else length
    if rule.chunk is not None:
        size = min(size, rule.chunk)  # each block reads the keys of two chunks at most
    outputs = []
    for start in range(0, length, size):
        queries = range(before + start, before + min(start + size, length))
        keys = range(rule.first_key(queries.start), queries.stop)
        visible = rule.visible(queries, keys, query.device)
        q = query if len(queries) == length else query[:, :, start : start + size]
        k, v = key, value
        if len(keys) < key.shape[2]:
            k, v = (x[:, :, keys.start : keys.stop] for x in (key, value))
        outputs.append(_attend(q, k, v, visible, rule))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, rule: Rule
) -> Tensor:
    """Attention of L queries to M keys: [1, Hq, L, Dv].

    visible: [L, M] bool, or None: query i sees the keys up to i.
    """
    grouped, mask = query.shape[1] != key.shape[1], visible
    if rule.softcap is not None:
        return _attend_capped(query, key, value, visible, rule)
    if rule.sinks is not None:
        if visible is None:
            visible = causal(query.shape[2], query.device)
        # The column of the sinks: a key of zeros, whose score the mask makes s, and no value.
        scores = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -torch.inf)
        sinks = rule.sinks.to(query.dtype)[:, None, None].expand(-1, query.shape[2], 1)
        mask = torch.cat([scores.expand(len(sinks), -1, -1), sinks], dim=-1)[None]
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=mask is None,
        scale=rule.scale,
        enable_gqa=grouped,
    )


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, rule: Rule
) -> Tensor:
    """`_attend` with a soft cap, which SDPA does not have."""
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if visible is None:
        visible = causal(query.shape[2], query.device)
    scale = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    cap = rule.softcap
    assert cap is not None
    scores = cap * torch.tanh(query @ key.transpose(2, 3) * scale / cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    # The softmax is in at least fp32, as in transformers' eager attention.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        value.dtype
    )
    return F.dropout(weights, rule.dropout) @ value


def causal(length: int, device: torch.device) -> Tensor:
    """[length, length] bool: each token sees those up to itself."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


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
    decoder = model.get_decoder()
    if decoder is model:  # some name it otherwise than their class says
        decoder = getattr(model, "model", None)
    if not isinstance(decoder, PreTrainedModel):
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
