"""From raw logits, a GEMM's output, to scaled logits: bias, soft cap and temperature applied.

    s = softcap(x + b) / temperature,    softcap(x) = cap tanh(x / cap)

The same is in C++ (csrc/logits.h) and in Triton (gpu/math.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """The options that turn raw logits into scaled ones."""

    bias: Tensor | None  # [C], contiguous, in the logits' dtype
    softcap: float | None
    temperature: float

    def at(self, columns: slice | Tensor) -> LogitTransform:
        """The transform of some columns: a slice of them, or their indices."""
        return self if self.bias is None else self._replace(bias=self.bias[columns])

    def slope(self, scaled: Tensor) -> Tensor | None:
        """ds/dx times the temperature, `1 - tanh^2`, at scaled logits; None without a soft cap."""
        if self.softcap is None:
            return None
        tanh = scaled * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1)


SCALED = LogitTransform(None, None, 1.0)  # the identity: for logits that are scaled already


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """float64 where a hidden state or head is float64, otherwise float32."""
    is_double = any(operand.dtype == torch.float64 for operand in operands)
    return torch.float64 if is_double else torch.float32


def transform_(logits: Tensor, transform: LogitTransform) -> Tensor:
    """Scale raw logits in place, and return them."""
    bias, softcap, temperature = transform
    if bias is not None:
        logits.add_(bias)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap / temperature)
    elif temperature != 1:
        logits.div_(temperature)
    return logits
