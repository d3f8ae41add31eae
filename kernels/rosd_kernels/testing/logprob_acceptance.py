"""Acceptance of `span_logprob` on a device, like acceptance.py for `span_divergence`.

The checks: every strategy and option against the reference in float64 on the same rounded inputs,
with a clipped policy gradient that is computed in the same pass or afterwards; equal bits from
equal calls while fresh memory is full of NaN; logits of +-80, no tokens, shapes that no block
divides; a `sparsity` that drops next to nothing, and one whose error is below the bound that it
reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosd_kernels.logprob.api import span_logprob
from rosd_kernels.logprob.records import SpanLogprobOutput, TokenLoss
from rosd_kernels.sparsity import entry, mass
from rosd_kernels.testing.checking import (
    EPS,
    SHAPES,
    SIZE,
    SLACK,
    SMALL,
    TOLERANCES,
    Check,
    Shape,
    Timing,
    error_ratio,
    full_float32,
    measure,
    poisoned_memory,
    sparsity_check,
)
from rosd_kernels.testing.peers import (
    eager_cross_entropy,
    gemm_floor,
    liger_cross_entropy,
    minus_logprob,
    peaked_states,
)

FAST = ("chunked", "tiled")
LEAVES = ("hidden", "head", "bias")
FINE = entry(1e-12)  # drops less than is rounded away
HUGE = 80.0  # logits whose exponentials overflow or vanish in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A call of `span_logprob`."""

    strategy: str
    shape: Shape
    dtype: torch.dtype
    fused: bool = True  # the loss is a `token_loss`; otherwise a function of the outputs
    extreme: bool = False
    everything: bool = False  # bias, soft cap, temperature
    sparse: bool = False  # with the rule FINE

    @property
    def name(self) -> str:
        words = ["logprob", self.strategy, str(self.dtype).removeprefix("torch.")]
        words.append("x".join(map(str, self.shape)))
        words += [] if self.fused else ["loss afterwards"]
        words += ["extreme"] if self.extreme else []
        words += ["all options"] if self.everything else []
        words += ["fine sparsity"] if self.sparse else []
        return " ".join(words)


def cases(shapes: tuple[Shape, ...] = SHAPES, small: tuple[Shape, ...] = SMALL) -> Iterator[Case]:
    """Yield all calls that are checked."""
    for strategy in FAST:
        for dtype in TOLERANCES:
            for fused in (True, False):
                for shape in shapes:
                    yield Case(strategy=strategy, shape=shape, dtype=dtype, fused=fused)
                for sparse in (False, True):
                    more = {"dtype": dtype, "fused": fused, "everything": True, "sparse": sparse}
                    yield Case(strategy=strategy, shape=shapes[0], **more)
                more = {"dtype": dtype, "fused": fused, "sparse": True}
                yield Case(strategy=strategy, shape=shapes[-1], **more)
        for fused in (True, False):
            for sparse in (False, True):
                more = {"dtype": torch.float32, "fused": fused, "sparse": sparse}
                yield Case(strategy=strategy, shape=shapes[-1], extreme=True, **more)
        for shape in small:
            yield Case(strategy=strategy, shape=shape, dtype=torch.float32, everything=True)


def checks(
    device: torch.device, shapes: tuple[Shape, ...] = SHAPES, small: tuple[Shape, ...] = SMALL
) -> Iterator[Check]:
    """Check every case; yield one line per case."""
    with full_float32():
        for case in cases(shapes, small):
            yield check(case, device)
        for strategy in FAST:
            for name, rule in (("entry", entry(1e-3)), ("mass", mass(1e-3))):
                yield check_sparsity(device, strategy, name, rule, shapes[-1])


def check(case: Case, device: torch.device) -> Check:
    """Compare a fast strategy with the reference in float64, and with a second call of itself."""
    tensors, token_loss = make_tensors(case, device)
    options: dict[str, Any] = {}
    if case.everything:
        options = {"temperature": 1.3, "softcap": 20.0}
    fast = {"strategy": case.strategy} | ({"sparsity": FINE} if case.sparse else {})
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    truth = results(wide, token_loss, case.fused, **options, strategy="reference")
    with poisoned_memory():
        got, again = (results(tensors, token_loss, case.fused, **options, **fast) for _ in range(2))
    repeats = all(torch.equal(value, again[name]) for name, value in got.items())

    value_tolerance, tolerance = TOLERANCES[case.dtype]
    factor = 2 if case.extreme else 1
    slack = HUGE * SLACK if case.extreme else SLACK
    excess = {}
    for name, value in got.items():
        of = (tolerance, 10 * SLACK) if name in LEAVES else (value_tolerance, slack)
        excess[name] = error_ratio(value, truth[name], factor * of[0], of[1])
    worst = max(excess, key=lambda name: excess[name])
    text = f"{worst}: {100 * excess[worst]:.0f}% of the allowed error"
    if not repeats:
        text += "; a second call gave other bits"
    return Check(case.name, excess[worst] <= 1 and repeats, text)


def check_sparsity(
    device: torch.device, strategy: str, name: str, rule: Any, shape: Shape
) -> Check:
    """Compare the gradient error with its bound; the head is the identity, so hidden are logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape.N, shape.V, generator=generator)
    logits[:, : shape.V // 4] += 9
    ids = torch.randint(shape.V // 2, (shape.N,), generator=generator).to(device)
    logits, head = logits.to(device), torch.eye(shape.V, device=device)

    def gradient(sparsity: Any) -> tuple[Tensor, SpanLogprobOutput]:
        leaf = logits.clone().requires_grad_()
        call: dict[str, Any] = {"strategy": strategy, "sparsity": sparsity}
        out = span_logprob(leaf, head, ids, token_loss=with_entropy, **call)
        return torch.autograd.grad(out.loss, leaf)[0].double(), out

    exact, _ = gradient("exact")
    sparse, out = gradient(rule)
    title = f"logprob sparsity {strategy} {name}({rule.bound})"
    return sparsity_check(title, exact, sparse, out.stats, rule)


def with_entropy(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
    return -logprob - 0.1 * entropy


def make_tensors(case: Case, device: torch.device) -> tuple[dict[str, Tensor], TokenLoss]:
    """The tensor arguments of a case, with equal values on every device, and its loss."""
    (N, V, H), generator = case.shape, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, head = normal(N, H), 3 * normal(V, H) / H**0.5
    if case.extreme:  # one nonzero entry per row of the head: logits +-80
        hidden, head = hidden.sign(), torch.zeros(V, H)
        head[torch.arange(V), torch.arange(V) % H] = HUGE
    tensors = {"hidden": hidden, "head": head}
    if case.everything:
        tensors["bias"] = normal(V)
    tensors = {name: x.to(device, case.dtype) for name, x in tensors.items()}
    tensors["token_ids"] = torch.randint(V, (N,), generator=generator).to(device)
    advantages, rollout = normal(N).to(device), -9 + normal(N).to(device)

    def token_loss(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        """A clipped policy gradient with an entropy bonus."""
        gain = advantages[rows].to(logprob.dtype)
        ratio = torch.exp((logprob - rollout[rows].to(logprob.dtype)).clamp(max=3))
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain) - 0.1 * entropy

    return tensors, token_loss


def results(
    tensors: dict[str, Tensor], token_loss: TokenLoss, fused: bool, **options: Any
) -> dict[str, Tensor]:
    """Loss, log-probs, entropies and the gradients, by name."""
    leaves = {n: tensors[n].clone().requires_grad_() for n in LEAVES if n in tensors}
    call = {**tensors, **leaves, **options, "token_loss": token_loss if fused else None}
    out = span_logprob(**call)
    rows = slice(0, len(out.logprob))
    loss = out.loss if fused else token_loss(out.logprob, out.entropy, rows).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    values = {"loss": loss, "logprob": out.logprob, "entropy": out.entropy}
    found = {name: value.detach() for name, value in values.items()}
    return found | dict(zip(leaves, gradients, strict=True))


def timings(
    device: torch.device,
    size: Shape = SIZE,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 10,
) -> Iterator[Timing]:
    """Time cross entropy with gradients to hidden states and head, one candidate at a time."""
    generator = torch.Generator(device=device).manual_seed(0)
    hidden, _, head = (x.to(dtype) for x in peaked_states(*size, generator))
    ids = torch.randint(size.V, (size.N,), generator=generator, device=device)
    hidden.requires_grad_()

    def ours(strategy: str, sparsity: Any = "exact") -> Callable[[], Tensor]:
        call: dict[str, Any] = {"strategy": strategy, "sparsity": sparsity}
        return lambda: span_logprob(hidden, head, ids, token_loss=minus_logprob, **call).loss

    candidates: dict[str, tuple[bool, Callable[[], Any]]] = {
        "chunked": (True, ours("chunked")),
        "chunked, frozen head": (False, ours("chunked")),
        "chunked, entry 2^-12": (True, ours("chunked", entry(EPS))),
        "tiled": (True, ours("tiled")),
        "tiled, entry 2^-12": (True, ours("tiled", entry(EPS))),
        "eager": (True, lambda: eager_cross_entropy(hidden, head, ids)),
        "liger": (True, lambda: liger_cross_entropy(hidden, head, ids)),
    }
    for name, (trains_head, forward) in candidates.items():
        head.requires_grad_(trains_head)

        def step(forward: Callable[[], Any] = forward) -> None:
            hidden.grad = head.grad = None
            forward().backward()

        yield measure(name, step, device, repeats)
        hidden.grad = head.grad = None
    chunk_rows = 128 if device.type == "cpu" else 1024
    floor = gemm_floor(hidden, None, head, chunk_rows=chunk_rows)
    yield measure("3 GEMM sweeps", floor, device, repeats)
