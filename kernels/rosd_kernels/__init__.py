"""Token-level divergences between student and teacher, from hidden states, without holding logits.

`span_divergence` is the one entry point; see its docstring for shapes, options and errors.

Shape legend, used in every file: N distilled tokens, V vocabulary, H hidden width of the student,
Ht hidden width of the teacher, R rows (tokens) of a chunk or block.

    api.py          the public function
    records.py      inputs and options (each checked once), output
    reference.py    strategy "reference": plain PyTorch, autograd does the gradient
    chunked.py      strategy "chunked": bounded workspace, gradients in the same pass
    workspace.py    the memory of "chunked", and the GEMMs that go through it
    divergences.py  the in-place arithmetic of "chunked", with the gradient formulas
"""

from __future__ import annotations

from rosd_kernels.api import span_divergence
from rosd_kernels.records import SpanDivergenceOutput, SpanDivergenceStats

__version__ = "0.1.0"

__all__ = ["SpanDivergenceOutput", "SpanDivergenceStats", "__version__", "span_divergence"]
