"""Random cases for span_logprob, and the comparison that every numeric test makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosd_kernels import SpanLogprobOutput, span_logprob

LEAVES = ("hidden", "head", "bias")


@dataclass(frozen=True, kw_only=True)
class Result:
    output: SpanLogprobOutput
    gradients: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The tensors of a call; `run` makes fresh leaves of them, so that it never modifies a case."""

    tensors: dict[str, Tensor]
    weights: Tensor  # [N]
    rollout_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]

    def cross_entropy(self, logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return -self.weights[rows].to(logprob.dtype) * logprob

    def clipped(self, logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        """A clipped policy gradient with an entropy bonus."""
        weights, rollout, advantages = (
            x[rows].to(logprob.dtype)
            for x in (self.weights, self.rollout_logprobs, self.advantages)
        )
        ratio = torch.exp((logprob - rollout).clamp(max=5))
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
        return -weights * (surrogate + 0.2 * entropy)

    def run(
        self,
        loss: str | None = "clipped",
        *,
        dtype: torch.dtype | None = None,
        needs: tuple[str, ...] = LEAVES,
        factor: float = 1.0,
        **options: Any,
    ) -> Result:
        """Return the output and the gradients of `factor * loss`.

        loss: the name of a method above, for `token_loss`, or None; with "afterwards " in front of
        it, the method is applied to the differentiable output instead. dtype: of all floats.
        """
        tensors = {name: x.detach() for name, x in self.tensors.items()}
        if dtype is not None:
            tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
        leaves = {}
        for name in needs:
            if name in tensors:
                tensors[name] = leaves[name] = tensors[name].requires_grad_()
        word, _, after = (loss or "").rpartition(" ")
        method = getattr(self, after) if after else None
        output = span_logprob(**tensors, token_loss=None if word else method, **options)
        total = output.loss
        if word:
            assert method is not None
            rows = slice(0, len(output.logprob))
            total = method(output.logprob, output.entropy, rows).sum()
        if not leaves:
            return Result(output=output, gradients={})
        gradients = torch.autograd.grad(factor * total, list(leaves.values()))
        return Result(output=output, gradients=dict(zip(leaves, gradients, strict=True)))


def make(
    N: int,
    V: int,
    H: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """`scale` is about the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    tensors = {"hidden": normal(N, H), "head": normal(V, H, std=scale / H**0.5)}
    if bias:
        tensors["bias"] = normal(V)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["token_ids"] = torch.randint(V, (N,), generator=generator)
    return Case(
        tensors=tensors,
        weights=torch.rand(N, generator=generator),
        rollout_logprobs=-torch.tensor(V).log() + normal(N, std=0.3).float(),
        advantages=normal(N).float(),
    )


def assert_agrees(
    actual: Result, truth: Result, *, tolerance: float = 1e-5, scale: float = 1
) -> None:
    """Values and gradients to `tolerance` of their largest, times `scale`.

    A gradient in a narrow dtype may be off by that dtype's one rounding on top. The slack is the
    rounding of float32 log-probabilities, which counts where values are next to nothing.
    """
    for name in ("loss", "logprob", "entropy"):
        got, want = getattr(actual.output, name), getattr(truth.output, name)
        close(name, got.detach(), want.detach(), tolerance * scale, slack=2e-6 * scale)
    assert actual.gradients.keys() == truth.gradients.keys()
    for name, want in truth.gradients.items():
        got = actual.gradients[name]
        close(f"gradient of {name}", got, want, tolerance * scale, slack=2e-7 * scale)


def close(name: str, got: Tensor, want: Tensor, tolerance: float, slack: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {got.shape}, want {want.shape}"
    if want.numel() == 0:
        return
    rounding = 0.0 if got.dtype in (torch.float32, torch.float64) else torch.finfo(got.dtype).eps
    error = (got.double() - want.double()).abs()
    bound = tolerance * want.double().abs().max() + rounding / 2 * want.double().abs() + slack
    worst = int((error - bound).nan_to_num(nan=torch.inf).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: element {worst} is {got.flatten()[worst].item()}, "
        f"want {want.flatten()[worst].item()}, error {error.flatten()[worst].item():.2e}"
    )
