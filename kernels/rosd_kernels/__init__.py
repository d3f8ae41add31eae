"""Token-level losses from hidden states, without full logits.

`span_divergence` is the divergence between a student and a teacher; `span_logprob` the sampled
tokens' log-probabilities and entropies, for policy gradients and cross entropy. Their docstrings
have shapes, options and errors.

Shape legend, used in every file: N distilled tokens, V vocabulary, H hidden width of the student,
Ht hidden width of the teacher, R rows (tokens) of a chunk or block.

    api.py          the public function
    records.py      inputs and options (each checked once), output
    logits.py       from raw logits to scaled ones: bias, soft cap, temperature
    reference.py    strategy "reference": plain PyTorch, autograd does the gradient
    chunked.py      strategy "chunked": dense GEMMs through a bounded workspace (workspace.py); with
                    a sparsity, gradients of active entries: sparse_chunks.py, active.py, compact.py
    tiled.py        strategy "tiled": tile by tile (tiles.py); sparsity.py selects the tiles that
                    matter, and order.py puts likely entries into the same tiles
    auto.py         strategy "auto": the choice between these two
    vocabulary.py   heads that are sharded over a process group
    rows.py         statistics of rows from those of their tiles
    autograd.py     gradients that are computed in forward
    checks.py       checks of arguments
    divergences.py  the formulas, in plain PyTorch
    logprob/        the same parts of `span_logprob`

    elementwise.py  passes over logits: in C++ (native.py, csrc/) or plain PyTorch (plain.py)
    gemm_tiles.py   the dense work of "tiled" with library GEMMs, on head_tiles.py
    gpu/            Triton: the dense work of "tiled", the elementwise pass of "chunked"
    backends.py     the choice of an implementation per device
    testing/        acceptance on a device, compilation of gpu/ without a GPU, baselines
"""

from __future__ import annotations

from rosd_kernels.api import span_divergence
from rosd_kernels.logprob.api import span_logprob
from rosd_kernels.logprob.records import SpanLogprobOutput
from rosd_kernels.order import VocabularyOrder
from rosd_kernels.records import SpanDivergenceOutput, SpanStats
from rosd_kernels.sparsity import entry, mass

__version__ = "0.1.0"

__all__ = [
    "SpanDivergenceOutput",
    "SpanLogprobOutput",
    "SpanStats",
    "VocabularyOrder",
    "__version__",
    "entry",
    "mass",
    "span_divergence",
    "span_logprob",
]
