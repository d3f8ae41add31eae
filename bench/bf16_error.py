"""Errors of bfloat16 gradients: G rounded between GEMMs, a GPU's way, against bfloat16 logits.

A GPU multiplies bfloat16 operands and sums in float32. There, `chunked` keeps logits and statistics
in float32 and rounds G to bfloat16 before `dh = G W` and `dW = G^T h`. A CPU has no such product in
torch, so it is emulated: in float32, where the products of bfloat16 operands are exact.

The candidates, JSD of bfloat16 inputs, peaked like a language model's:

    rounding         the float64 gradients rounded to bfloat16: what no candidate can avoid
    float32 G        `chunked` on a CPU
    bfloat16 G       `chunked` as on a GPU, emulated
    bfloat16 logits  the textbook formula in float32, on logits that a bfloat16 GEMM has rounded
    liger            Liger's chunked JSD, which rounds its logits likewise

Errors are relative to float64 on the same inputs: of the norm, and the largest element's, relative
to the largest element.

    python bench/bf16_error.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import record
from torch import Tensor

from rosd_kernels import span_divergence, workspace
from rosd_kernels.testing.peers import eager_jsd, liger_jsd, peaked_states

CSV = Path(__file__).parent / "results" / "bf16_error.csv"
BF16 = torch.bfloat16
Gradients = tuple[Tensor, Tensor]  # dh [N, H], dW [V, H]


@contextmanager
def narrow_products() -> Iterator[None]:
    """Give CPUs the products of bfloat16 operands with float32 sums that GPUs have."""

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return torch.mm(a.float(), b.float(), out=out)

    def addmm(
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        out_dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor,
    ) -> Tensor:
        return out.copy_(bias + torch.mm(a.float(), b.float()))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    try:
        with mock.patch.object(workspace, "NARROW_DEVICES", ("cpu",)):
            yield
    finally:
        library._destroy()


def gradients(forward: Callable[..., Tensor], *inputs: Tensor) -> Gradients:
    """Autograd's gradients, in the dtype of the inputs: student and teacher [N, H], head [V, H]."""
    student, teacher, head = inputs
    leaf, weight = student.clone().requires_grad_(), head.clone().requires_grad_()
    dh, dW = torch.autograd.grad(forward(leaf, teacher, weight), (leaf, weight))
    return dh, dW


def chunked(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return span_divergence(student, teacher, head, strategy="chunked").loss


def as_on_gpu(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    with narrow_products():
        return chunked(student, teacher, head)


def textbook(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return eager_jsd(student, teacher, head, beta=0.5)


def liger(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return liger_jsd(student, teacher, head, beta=0.5)


def reference(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return span_divergence(student, teacher, head, strategy="reference").loss


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "float32 G": chunked,
    "bfloat16 G": as_on_gpu,
    "bfloat16 logits": textbook,
    "liger": liger,
}


def errors(found: Tensor, wanted: Tensor, *, is_mean: bool) -> tuple[float, float]:
    """(of the norm, of the largest element), relative. is_mean: `found` is of a mean, not a sum."""
    got = found.double()
    if is_mean:
        got = got * ((got * wanted).sum() / got.square().sum())
    difference = got - wanted
    largest = difference.abs().max() / wanted.abs().max()
    return float(difference.norm() / wanted.norm()), float(largest)


def measured(tokens: int, vocab: int, width: int) -> Iterator[dict[str, Any]]:
    """One row per candidate; Liger only where it is installed."""
    made = peaked_states(tokens, vocab, width, torch.Generator().manual_seed(0))
    inputs = [x.to(BF16) for x in made]
    wanted = gradients(reference, *(x.double() for x in inputs))
    found: dict[str, Gradients] = {"rounding": (wanted[0].to(BF16), wanted[1].to(BF16))}
    for name, forward in CANDIDATES.items():
        try:
            found[name] = gradients(forward, *inputs)
        except ImportError as error:
            print(f"{name}: not installed ({error.name})")
    for name, of_candidate in found.items():
        row: dict[str, Any] = {"tokens": tokens, "vocab": vocab, "hidden": width, "candidate": name}
        for gradient, got, want in zip(("dh", "dW"), of_candidate, wanted, strict=True):
            of_norm, largest = errors(got, want, is_mean=name == "liger")
            row |= {gradient: f"{of_norm:.2e}", f"{gradient}_largest": f"{largest:.2e}"}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--csv", type=Path, default=CSV, help="file to write")
    args = parser.parse_args()
    for row in record(args.csv, measured(args.tokens, args.vocab, args.width)):
        print(row)


if __name__ == "__main__":
    main()
