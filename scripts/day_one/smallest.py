"""The smallest case that launches the Triton kernels: what compute-sanitizer and ncu run.

python -m day_one.smallest [cuda|cpu] [N V H]
"""

from __future__ import annotations

import itertools
import sys

import torch

from rosd_kernels import entry, span_divergence, span_logprob
from rosd_kernels.testing.peers import minus_logprob, peaked_states


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    N, V, H = map(int, sys.argv[2:5]) if len(sys.argv) > 4 else (130, 515, 64)
    generator = torch.Generator(device=device).manual_seed(0)
    student, teacher, head = (x.bfloat16() for x in peaked_states(N, V, H, generator))
    ids = torch.randint(V, (N,), generator=generator, device=device)
    leaves = student.requires_grad_(), head.requires_grad_()
    choices = itertools.product(("chunked", "tiled"), ("exact", entry(2**-12)))
    for strategy, sparsity in choices:
        options = {"strategy": strategy, "sparsity": sparsity, "workspace_mib": 2048}
        out = span_divergence(student, teacher, head, token_ids=ids, **options)
        torch.autograd.grad(out.loss, leaves)
        policy = span_logprob(student, head, ids, token_loss=minus_logprob, **options)
        torch.autograd.grad(policy.loss, leaves)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
