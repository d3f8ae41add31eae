"""Acceptance of `span_divergence` on a device: correctness, time and memory. For a new GPU.

    for check in checks(torch.device("cuda")): ...         against float64, on the device
    for timing in timings(torch.device("cuda"), SIZE): ... against eager PyTorch and Liger

`rosd-fast doctor --gpu` prints both. The checks are those that the tests make in Triton's
interpreter: every strategy, divergence and option against the reference in float64 on the same
rounded inputs; equal bits from equal calls while fresh memory is full of NaN; logits of +-80, equal
student and teacher, no tokens, shapes that no block divides; and an error from `sparsity` below the
bound that it reports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rosd_kernels.api import span_divergence
from rosd_kernels.divergences import MAX_LOG_RATIO
from rosd_kernels.records import DIVERGENCES, SpanDivergenceOutput
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
from rosd_kernels.testing.peers import eager_jsd, gemm_floor, liger_jsd, peaked_states

Kind = Literal["near", "extreme", "same"]
FAST = ("chunked", "tiled")
STUDENTS = ("student_hidden", "student_head", "student_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A call of `span_divergence`."""

    strategy: str
    shape: Shape
    dtype: torch.dtype
    divergence: str = "jsd"
    kind: Kind = "near"
    everything: bool = False  # biases, soft cap, temperature, clips, weights, a teacher's own head
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.strategy, self.divergence, str(self.dtype).removeprefix("torch.")]
        words.append("x".join(map(str, self.shape)))
        words += [] if self.kind == "near" else [self.kind]
        words += ["all options"] if self.everything else []
        words += [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(words)


def cases(shapes: tuple[Shape, ...] = SHAPES, small: tuple[Shape, ...] = SMALL) -> Iterator[Case]:
    """Yield all calls that are checked."""
    for strategy in FAST:
        for dtype in TOLERANCES:
            for divergence in DIVERGENCES:
                for shape in shapes:
                    yield Case(strategy=strategy, shape=shape, dtype=dtype, divergence=divergence)
                yield Case(
                    strategy=strategy,
                    shape=shapes[0],
                    dtype=dtype,
                    divergence=divergence,
                    everything=True,
                )
        for divergence in DIVERGENCES:
            for kind in ("extreme", "same"):
                yield Case(
                    strategy=strategy,
                    shape=shapes[-1],
                    dtype=torch.float32,
                    divergence=divergence,
                    kind=kind,
                )
        for shape in small:
            yield Case(strategy=strategy, shape=shape, dtype=torch.float32, everything=True)
    for tail in (True, False):
        options = {"top_k": min(50, shapes[0].V - 1), "tail": tail}
        yield Case(strategy="chunked", shape=shapes[0], dtype=torch.float32, options=options)


def checks(
    device: torch.device, shapes: tuple[Shape, ...] = SHAPES, small: tuple[Shape, ...] = SMALL
) -> Iterator[Check]:
    """Check every case; yield one line per case."""
    with full_float32():
        for case in cases(shapes, small):
            yield check(case, device)
        for strategy, divergence in itertools.product(FAST, DIVERGENCES):
            for name, rule in (("entry", entry(1e-3)), ("mass", mass(1e-3))):
                yield check_sparsity(device, strategy, divergence, name, rule, shapes[-1])


def check(case: Case, device: torch.device) -> Check:
    """Compare a fast strategy with the reference in float64, and with a second call of itself."""
    tensors = make_tensors(case, device)
    options = make_options(case)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    truth, wanted = forward_backward(wide, {**options, "strategy": "reference"})
    with poisoned_memory():
        got, gradients = forward_backward(tensors, options)
        again, gradients_again = forward_backward(tensors, options)
    pairs = [(got.loss, again.loss), (got.per_token, again.per_token)]
    pairs += list(zip(gradients.values(), gradients_again.values(), strict=True))
    repeats = all(torch.equal(a, b) for a, b in pairs)

    loss_tolerance, tolerance = TOLERANCES[case.dtype]
    slack = SLACK
    if case.kind == "extreme":  # where logits are rounded to 1e-5
        loss_tolerance, tolerance, slack = 2 * loss_tolerance, 2 * tolerance, MAX_LOG_RATIO * SLACK
    excess = {"loss": error_ratio(got.loss, truth.loss, loss_tolerance, slack)}
    for name in ("per_token", "student_logprob", "teacher_logprob", "student_entropy"):
        a, b = getattr(got, name), getattr(truth, name)
        if b is not None:
            excess[name] = error_ratio(a, b, loss_tolerance, slack)
    for name, gradient in gradients.items():
        excess[name] = error_ratio(gradient, wanted[name], tolerance, 10 * SLACK)
    if case.kind == "same" and not 0 <= float(got.loss.detach()) < SLACK:
        excess["loss"] = float("inf")
    worst = max(excess, key=lambda name: excess[name])
    text = f"{worst}: {100 * excess[worst]:.0f}% of the allowed error"
    if not repeats:
        text += "; a second call gave other bits"
    return Check(case.name, excess[worst] <= 1 and repeats, text)


def check_sparsity(
    device: torch.device, strategy: str, divergence: str, name: str, rule: Any, shape: Shape
) -> Check:
    """Compare the gradient error with its bound.

    The head is the identity, so hidden states are logits, whose gradient the bound concerns.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape.N, shape.V, generator=generator)
    student[:, : shape.V // 4] += 9
    teacher = (student + torch.randn(shape.N, shape.V, generator=generator)).to(device)
    student, head = student.to(device), torch.eye(shape.V, device=device)
    options: dict[str, Any] = {"divergence": divergence, "strategy": strategy}

    def gradient(sparsity: Any) -> tuple[Tensor, SpanDivergenceOutput]:
        leaf = student.clone().requires_grad_()
        out = span_divergence(leaf, teacher, head, sparsity=sparsity, **options)
        return torch.autograd.grad(out.loss, leaf)[0].double(), out

    exact, _ = gradient("exact")
    sparse, out = gradient(rule)
    title = f"sparsity {strategy} {name}({rule.bound}) {divergence}"
    return sparsity_check(title, exact, sparse, out.stats, rule)


def timings(
    device: torch.device,
    size: Shape = SIZE,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 10,
) -> Iterator[Timing]:
    """Time JSD with gradients to hidden states and head, one candidate after the other."""
    generator = torch.Generator(device=device).manual_seed(0)
    states = peaked_states(*size, generator)
    student, teacher, head = (x.to(dtype) for x in states)
    del states
    student.requires_grad_()
    head.requires_grad_()

    def ours(strategy: str, sparsity: Any = "exact") -> Callable[[], SpanDivergenceOutput]:
        options: dict[str, Any] = {"strategy": strategy, "sparsity": sparsity}
        return lambda: span_divergence(student, teacher, head, **options)

    candidates: dict[str, Callable[[], Any]] = {
        "chunked": ours("chunked"),
        "chunked, entry 2^-12": ours("chunked", entry(EPS)),
        "tiled": ours("tiled"),
        "tiled, entry 2^-12": ours("tiled", entry(EPS)),
        "eager": lambda: eager_jsd(student, teacher, head, beta=0.5),
        "liger": lambda: liger_jsd(student, teacher, head, beta=0.5),
    }
    for name, forward in candidates.items():

        def step(forward: Callable[[], Any] = forward) -> str:
            student.grad = head.grad = None
            out = forward()
            loss = out if isinstance(out, Tensor) else out.loss
            loss.backward()
            return "" if isinstance(out, Tensor) else f"active {out.stats.active_frac:.2f}"

        yield measure(name, step, device, repeats)
        student.grad = head.grad = None
    chunk_rows = 128 if device.type == "cpu" else 1024
    floor = gemm_floor(student, teacher, head, chunk_rows=chunk_rows)
    yield measure("4 GEMM sweeps", floor, device, repeats)


def make_tensors(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The tensor arguments of a case, with equal values on every device."""
    (N, V, H), generator = case.shape, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if case.kind == "extreme":  # one nonzero entry per row of the head: logits +-80
        student_hidden = normal(N, H).sign()
        head = torch.zeros(V, H)
        head[torch.arange(V), torch.arange(V) % H] = MAX_LOG_RATIO
        tensors = {"teacher_hidden": normal(N, H).sign(), "student_head": head}
    else:
        student_hidden = normal(N, H)
        noise = 0.0 if case.kind == "same" else 0.7
        tensors = {
            "teacher_hidden": student_hidden + noise * normal(N, H),
            "student_head": 3 * normal(V, H) / H**0.5,
        }
    tensors["student_hidden"] = student_hidden
    if case.everything:
        tensors |= {
            "teacher_hidden": normal(N, H + 64),
            "teacher_head": 3 * normal(V, H + 64) / H**0.5,
            "student_bias": normal(V),
            "teacher_bias": normal(V),
            "rollout_logprobs": -3 * torch.rand(N, generator=generator),
        }
    tensors = {name: x.to(device, case.dtype) for name, x in tensors.items()}
    if case.everything:
        tensors["weights"] = torch.rand(N, generator=generator).to(device)
    tensors["token_ids"] = torch.randint(V, (N,), generator=generator).to(device)
    return tensors


def make_options(case: Case) -> dict[str, Any]:
    """The other arguments of a case."""
    options: dict[str, Any] = {"strategy": case.strategy, "divergence": case.divergence}
    if case.everything:
        options |= {"beta": 0.3, "temperature": 1.3, "softcap": 20.0, "importance_clip": 2.0}
    return options | dict(case.options)


def forward_backward(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[SpanDivergenceOutput, dict[str, Tensor]]:
    """The output, and the gradients of its loss."""
    leaves = {n: tensors[n].clone().requires_grad_() for n in STUDENTS if n in tensors}
    out = span_divergence(**{**tensors, **leaves}, **options)
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    return out, dict(zip(leaves, gradients, strict=True))
