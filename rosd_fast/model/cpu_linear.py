"""Linear layers on a CPU in float32 that compute with oneDNN where `rosd_fast.products` chose it.

    y = x W^T + b          dX = G W          dW = G^T X          db = sum of G's rows

oneDNN compiles a kernel for each new number of rows, in about 0.4 ms: small products, as those of
the last rows of a batch that is decoded, stay with torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rosd_fast.products import chosen, onednn_product

MIN_PRODUCT = 2**22
"""Rows x inputs x outputs from which oneDNN is used: about 80 microseconds of torch's."""


class CpuLinear(nn.Linear):
    """`nn.Linear`, of which `use_cpu_linear` makes it. Parameters, names and shapes are the same.

    Other dtypes and devices, autocast, torch.compile, sharded parameters, and weights that are not
    contiguous are computed as by `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if chosen() == "torch" or not self._suits(input):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        return linear(rows, self.weight, self.bias).view(*input.shape[:-1], self.out_features)

    def _suits(self, input: Tensor) -> bool:
        """Whether oneDNN can compute this product, and is faster."""
        weight, bias = self.weight, self.bias
        return (
            not torch.compiler.is_compiling()
            and input.numel() * self.out_features >= MIN_PRODUCT
            and type(input) is Tensor  # not a DTensor, nor one that a mode or transform wraps
            and type(weight) is nn.Parameter
            and _is_plain(input)
            and _is_plain(weight)
            and (bias is None or (type(bias) is nn.Parameter and _is_plain(bias)))
            and weight.shape == (self.out_features, input.shape[-1])
            and weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_cpu and tensor.layout == torch.strided


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, out] = x weight^T + bias by oneDNN, once differentiable; float32 on a CPU.

    x: [N, in], N at least 1. weight: [out, in]. bias: [out] or None.
    """
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, out] = x weight^T + bias; x and weight may be transposed views."""
    return onednn_product()(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()  # that of a sum is one number, expanded
        return (
            _product(grad, weight.t()) if needs_x else None,
            _product(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def use_cpu_linear(model: nn.Module) -> None:
    """Turn the linear layers in float32 on a CPU into `CpuLinear`, in place.

    The layers inside of adapters are among them; layers with a forward of their own are not.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            module.__class__ = CpuLinear
