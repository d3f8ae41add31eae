"""The implementation that a device uses: Triton on CUDA, C++ or plain PyTorch elsewhere.

Triton is imported only where it is used, as its import takes a while. The environment variable
ROSD_KERNELS_BACKEND=triton selects it on any device: with TRITON_INTERPRET=1 the kernels then run
on a CPU, slowly, which is how they are tested. ROSD_KERNELS_BACKEND=torch selects plain PyTorch and
C++ on any device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rosd_kernels.records import SpanInputs, SpanOptions


def uses_triton(like: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels handle tensors on `like`'s device, computed in `dtype`."""
    wish = os.environ.get("ROSD_KERNELS_BACKEND", "auto")
    if wish not in ("auto", "torch", "triton"):
        raise ValueError(f"ROSD_KERNELS_BACKEND: got {wish!r}, want auto, torch or triton")
    if wish == "torch" or dtype != torch.float32 or not has_triton():
        return False
    return wish == "triton" or like.device.type == "cuda"


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches on that, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def gpu_rows(like: Tensor, dtype: torch.dtype) -> Callable[..., Any] | None:
    """The fused elementwise pass of "chunked", or None where the device does not use Triton."""
    if not uses_triton(like, dtype):
        return None
    from rosd_kernels.gpu.rows import block_divergence

    return block_divergence


def gpu_sparse(like: Tensor, dtype: torch.dtype) -> Any:
    """The module of the passes of "chunked" with a sparsity, or None as in `gpu_rows`."""
    if not uses_triton(like, dtype):
        return None
    from rosd_kernels.gpu import sparse

    return sparse


def gpu_logprob_sparse(like: Tensor, dtype: torch.dtype) -> Any:
    """The block of `span_logprob`'s "chunked" with a sparsity, or None as in `gpu_rows`."""
    if not uses_triton(like, dtype):
        return None
    from rosd_kernels.gpu.logprob_sparse import SparseBlock

    return SparseBlock


def gpu_logprob(like: Tensor, dtype: torch.dtype) -> Any:
    """The module of `span_logprob`'s elementwise passes, or None as in `gpu_rows`."""
    if not uses_triton(like, dtype):
        return None
    from rosd_kernels.gpu import logprob

    return logprob


def make_tiles(inputs: SpanInputs, options: SpanOptions, permutation: Tensor | None) -> Any:
    """The dense work of "tiled": a `rosd_kernels.tiled.Tiles`."""
    if uses_triton(inputs.student_hidden, inputs.compute_dtype):
        from rosd_kernels.gpu.tiles import TritonTiles

        return TritonTiles(inputs, options, permutation)
    from rosd_kernels.gemm_tiles import GemmTiles

    return GemmTiles(inputs, options, permutation)
