"""A head of more than 2^31 elements: offsets of 32 bits would read and write other memory.

Compared are the loss, dh, and the first and last rows of dW, with float64 on the same rounded
inputs; float64 copies exist for a part of the head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.api import span_divergence
from rosd_kernels.testing.checking import SLACK, TOLERANCES, Check, Shape, error_ratio

LARGE = Shape(160, 151936, 14400)  # 2.19e9 elements of the head: 4.1 GiB in bfloat16
NEEDED_GIB = 40  # the head, dW in bfloat16 and in float32, and room
ROWS = 128  # of dW, at both ends
PART = 4096  # rows of the head in float64 at a time


def check_addresses(device: torch.device, strategy: str, shape: Shape = LARGE) -> Check:
    """Compare the JSD in bfloat16 with the definition, at both ends of the head."""
    N, V, H = shape
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, H, generator=generator, device=device)

    student = normal(N)
    teacher = (student + 0.7 * normal(N)).bfloat16()
    student = student.bfloat16()
    head = torch.empty(V, H, dtype=torch.bfloat16, device=device)
    for rows in parts_of(V):
        head[rows] = 3 * normal(rows.stop - rows.start) / math.sqrt(H)
    leaves = student.clone().requires_grad_(), head.requires_grad_()
    out = span_divergence(leaves[0], teacher, leaves[1], strategy=strategy)  # type: ignore[arg-type]
    dh, dW = torch.autograd.grad(out.loss, leaves)
    loss, wanted_dh, wanted_dW = truth(student, teacher, head.detach())

    ends = (slice(0, ROWS), slice(max(0, V - ROWS), V))
    loss_tolerance, tolerance = TOLERANCES[torch.bfloat16]
    excess = {
        "loss": error_ratio(out.loss, loss, loss_tolerance, SLACK),
        "dh": error_ratio(dh, wanted_dh, tolerance, 10 * SLACK),
    }
    for name, rows, wanted in zip(("first dW", "last dW"), ends, wanted_dW, strict=True):
        excess[name] = error_ratio(dW[rows], wanted, tolerance, 10 * SLACK)
    worst = max(excess, key=lambda name: excess[name])
    text = f"{V * H:.3g} elements; {worst}: {100 * excess[worst]:.0f}% of the allowed error"
    return Check(f"addresses {strategy} {N}x{V}x{H}", excess[worst] <= 1, text)


def parts_of(size: int) -> Iterator[slice]:
    for start in range(0, size, PART):
        yield slice(start, min(start + PART, size))


def truth(
    student: Tensor, teacher: Tensor, head: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(loss, dh [N, H], (the first and the last rows of dW)) of the JSD with beta 1/2, float64."""
    hidden = student.double()
    log_p, log_q = (
        torch.cat(
            [x.double() @ head[rows].double().T for rows in parts_of(len(head))], dim=1
        ).log_softmax(-1)
        for x in (student, teacher)
    )
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p = log_p.exp()
    of_student = (p * (log_p - log_m)).sum(-1, keepdim=True)
    of_teacher = (log_q.exp() * (log_q - log_m)).sum()
    G = p * (log_p - log_m - of_student) / 2
    dh = torch.zeros_like(hidden)
    for rows in parts_of(len(head)):
        dh += G[:, rows] @ head[rows].double()
    ends = G[:, :ROWS].T @ hidden, G[:, -ROWS:].T @ hidden
    return (of_student.sum() + of_teacher) / 2, dh, ends
