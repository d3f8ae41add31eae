"""The caller's loss per token: its value, and its derivatives by autograd on tiny vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.checks import FLOAT_DTYPES
from rosd_kernels.logprob.records import Slopes, TokenLoss, TokenValues


def checked(losses: Tensor, num_tokens: int) -> Tensor:
    """What a `token_loss` returned. Raises ValueError where it is not one float per token."""
    wish = f"[n] = [{num_tokens}] losses"
    if not isinstance(losses, Tensor):
        raise ValueError(f"token_loss: returned {type(losses).__name__}, want a tensor of {wish}")
    if tuple(losses.shape) != (num_tokens,) or losses.dtype not in FLOAT_DTYPES:
        got = f"{losses.dtype} of shape {list(losses.shape)}"
        raise ValueError(f"token_loss: returned {got}, want floats of shape {wish}")
    return losses


def evaluate(
    token_loss: TokenLoss, values: TokenValues, rows: slice, needs_gradient: bool
) -> tuple[Tensor, Slopes | None]:
    """Return ([n] losses of the tokens `rows`, detached, their slopes or None).

    values: of these tokens only.
    """
    dtype, size = values.logprob.dtype, len(values.logprob)
    if size == 0:
        return values.logprob, Slopes(values.logprob, values.logprob)
    if not needs_gradient:
        losses = checked(token_loss(values.logprob, values.entropy, rows), size)
        return losses.detach().to(dtype), None
    with torch.enable_grad():
        logprob = values.logprob.detach().requires_grad_()
        entropy = values.entropy.detach().requires_grad_()
        losses = checked(token_loss(logprob, entropy, rows), size)
        slopes: tuple[Tensor | None, ...] = (None, None)
        if losses.requires_grad:
            slopes = torch.autograd.grad(losses.sum(), (logprob, entropy), allow_unused=True)
    found = (torch.zeros_like(values.logprob) if x is None else x.to(dtype) for x in slopes)
    return losses.detach().to(dtype), Slopes(*found)
