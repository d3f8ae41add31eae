"""Token-level divergences between student and teacher, from hidden states, without holding logits.

`span_divergence` is the one entry point; see its docstring for shapes, options and errors.

Shape legend, used in every file: N distilled tokens, V vocabulary, H hidden width of the student,
Ht hidden width of the teacher, R rows (tokens) of a chunk or block.

    api.py          the public function
    records.py      inputs and options (each checked once), output
    reference.py    strategy "reference": plain PyTorch, autograd does the gradient
    chunked.py      strategy "chunked": dense GEMMs through a bounded workspace (workspace.py)
    tiled.py        strategy "tiled": tile by tile; the tiles that matter are chosen by sparsity.py,
                    and order.py brings likely entries together
    auto.py         which of the two
    vocabulary.py   heads that are sharded over a process group
    rows.py         from statistics of tiles to those of rows
    autograd.py     gradients that are made in forward
    divergences.py  the formulas, in plain PyTorch

    elementwise.py  passes over logits: in C++ (native.py, csrc/) or plain PyTorch (plain.py)
    gemm_tiles.py   the dense work of "tiled" with library GEMMs
    gpu/            Triton: the dense work of "tiled", the elementwise pass of "chunked"
    backends.py     which of them a device gets
    aot.py          compiles all of gpu/ without a GPU and checks the machine code
"""

from __future__ import annotations

from rosd_kernels.api import span_divergence
from rosd_kernels.order import VocabularyOrder
from rosd_kernels.records import SpanDivergenceOutput, SpanDivergenceStats
from rosd_kernels.sparsity import entry, mass

__version__ = "0.1.0"

__all__ = [
    "SpanDivergenceOutput",
    "SpanDivergenceStats",
    "VocabularyOrder",
    "__version__",
    "entry",
    "mass",
    "span_divergence",
]
