"""Attention of packed segments by flash-attn, on a GPU that has it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils import import_utils

if TYPE_CHECKING:
    from rosd_fast.model.attention import Segments
    from rosd_fast.model.sdpa import Rule

SINK_PADDING = 8  # more elements of a head for sinks: flash-attn wants a multiple of 8


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
    size, scale = query.shape[-1], rule.scale
    max_length_q, max_length_k = segments.max_lengths
    cu_seqlens_k = segments.cu_seqlens_k
    if rule.sinks is not None:
        scale = size**-0.5 if scale is None else scale
        query, keys, values = with_sink_keys(query, keys, values, rule.sinks / scale)
        cu_seqlens_k = cu_seqlens_k + torch.arange(len(cu_seqlens_k)).to(cu_seqlens_k)
        max_length_k += 1
    output = _flash_attention_forward(
        query.transpose(1, 2),
        torch.cat(keys, dim=2).transpose(1, 2),
        torch.cat(values, dim=2).transpose(1, 2),
        attention_mask=None,
        query_length=query.shape[2],
        is_causal=True,
        dropout=rule.dropout,
        softmax_scale=scale,
        sliding_window=rule.window,
        softcap=rule.softcap,
        cu_seq_lens_q=segments.cu_seqlens_q,  # type: ignore[arg-type]
        cu_seq_lens_k=cu_seqlens_k,  # type: ignore[arg-type]
        max_length_q=max_length_q,
        max_length_k=max_length_k,
        attn_implementation=flash_attention(),
    )
    return output if rule.sinks is None else output[..., :size]


def with_sink_keys(
    query: Tensor, keys: list[Tensor], values: list[Tensor], sinks: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Sinks as ordinary keys, for kernels that have none: a head size of D + 8 and a key more.

        q' = [q, s, 0 ...]    k' = [k, 0, 0 ...]    v' = [v, 0, 0 ...]
        the first key of each segment = [0, 1, 0 ...], its value = 0

    sinks: [Hq], divided by the scale of the scores.
    """
    column = sinks.to(query)[:, None, None].expand(-1, query.shape[2], 1)[None]
    query = F.pad(torch.cat([query, column], dim=-1), (0, SINK_PADDING - 1))
    first = torch.zeros_like(F.pad(keys[0][:, :, :1], (0, SINK_PADDING)))
    first[..., keys[0].shape[-1]] = 1
    keys = [torch.cat([first, F.pad(key, (0, SINK_PADDING))], dim=2) for key in keys]
    values = [F.pad(value, (0, SINK_PADDING, 1, 0)) for value in values]
    return query, keys, values


def can_flash(query: Tensor, rule: Rule) -> bool:
    """Whether an installed flash-attn supports the query's device and dtype, and the rule.

    Its kernels have no chunks, and a sink, which is the first key, would leave a window.
    """
    return (
        query.is_cuda
        and rule.chunk is None
        and (rule.sinks is None or rule.window is None)
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
