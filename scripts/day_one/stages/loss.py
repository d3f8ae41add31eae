"""The loss and its gradients against its peers, by time, memory and error; and what may capture it.

A share is that of the machine's bfloat16 ceiling that a candidate would reach if it did four units
of work (three for a policy loss): candidates that skip work may exceed 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from day_one.results import Row
from day_one.stage import Phase, Plan, Stage
from rosd_kernels import VocabularyOrder, entry, span_divergence, span_logprob
from rosd_kernels.testing import peers
from rosd_kernels.testing.checking import EPS, SIZE, Shape, full_float32, measure
from rosd_kernels.testing.tile_peer import tile_jsd

JSD, POLICY, ERRORS, CAPTURE = (
    "Divergence, forward and backward",
    "Cross entropy, forward and backward",
    "Error of bfloat16 gradients",
    "Captured",
)
CHUNK_MIB = (256, 1024, 2048, 4096, 8192)
TOP_K = 100
LEARN_TOKENS = 256
SOFTCAP = 30.0
BIG_GIB = 60  # a GPU with more gets the larger problem
SHAPES = {"big": Shape(8192, SIZE.V, SIZE.H), "gpu": SIZE, "cpu": Shape(64, 2048, 64)}
ERROR_SHAPES = {"cuda": Shape(512, 32768, 1024), "cpu": Shape(64, 1024, 64)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to compute the loss.

    forward: of student, teacher, head, ids; returns what has a gradient, None if it made it itself.
    units: of dense work that the share counts.
    """

    forward: Callable[..., Any]
    table: str = JSD
    trains_head: bool = True
    units: int = 4


def ours(**options: Any) -> Callable[..., Any]:
    def forward(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Any:
        return span_divergence(student, teacher, head, **options)

    return forward


def with_order(strategy: str) -> Callable[..., Any]:
    """Sparse, over a vocabulary whose order a call of its own has learned."""
    orders: list[VocabularyOrder] = []

    def forward(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Any:
        if not orders:
            orders.append(VocabularyOrder(len(head), num_tokens=min(LEARN_TOKENS, len(student))))
            forward(student, teacher, head, ids)
        rule = entry(EPS, order=orders[0])
        return ours(strategy=strategy, sparsity=rule)(student, teacher, head, ids)

    return forward


def policy(**options: Any) -> Callable[..., Any]:
    def forward(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Any:
        return span_logprob(student, head, ids, token_loss=peers.minus_logprob, **options)

    return forward


def peer(function: Callable[..., Any], table: str = JSD) -> Callable[..., Any]:
    def forward(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Any:
        if table == POLICY:
            return function(student, head, ids)
        return function(student, teacher, head, beta=0.5)

    return forward


def tiles(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> None:
    tile_jsd(student, teacher, head, beta=0.5)


@cache
def candidates() -> dict[str, Candidate]:
    """All candidates, those first that say most."""
    found = {"chunked": Candidate(forward=ours(strategy="chunked"))}
    for mib in CHUNK_MIB:
        forward = ours(strategy="chunked", workspace_mib=mib)
        found[f"chunked, {mib} MiB"] = Candidate(forward=forward)
    sparse = {"sparsity": entry(EPS)}
    found |= {
        "eager": Candidate(forward=peer(peers.eager_jsd)),
        "liger": Candidate(forward=peer(peers.liger_jsd)),
        "tile formula": Candidate(forward=tiles),
        "tiled": Candidate(forward=ours(strategy="tiled")),
        "tiled, entry 2^-12": Candidate(forward=ours(strategy="tiled", **sparse)),
        "tiled, entry 2^-12, ordered": Candidate(forward=with_order("tiled")),
        "chunked, entry 2^-12": Candidate(forward=ours(strategy="chunked", **sparse)),
        "chunked, entry 2^-12, ordered": Candidate(forward=with_order("chunked")),
        "chunked, frozen head": Candidate(
            forward=ours(strategy="chunked"), trains_head=False, units=3
        ),
        "chunked, forward KL": Candidate(forward=ours(strategy="chunked", divergence="forward_kl")),
        "chunked, top 100 + tail": Candidate(forward=ours(strategy="chunked", top_k=TOP_K)),
        "chunked, soft cap": Candidate(forward=ours(strategy="chunked", softcap=SOFTCAP)),
    }
    of_policy = {
        "policy: chunked": policy(strategy="chunked"),
        "policy: chunked, 2048 MiB": policy(strategy="chunked", workspace_mib=2048),
        "policy: chunked, entry 2^-12": policy(strategy="chunked", **sparse),
        "policy: tiled, entry 2^-12": policy(strategy="tiled", **sparse),
        "policy: eager": peer(peers.eager_cross_entropy, POLICY),
        "policy: liger": peer(peers.liger_cross_entropy, POLICY),
    }
    for name, forward in of_policy.items():
        found[name] = Candidate(forward=forward, table=POLICY, units=3)
    return found


GRADIENTS: dict[str, Callable[..., Any]] = {
    "chunked": ours(strategy="chunked"),
    "tiled": ours(strategy="tiled"),
    "eager": peer(peers.eager_jsd),
    "liger": peer(peers.liger_jsd),
}


class Loss(Stage):
    name = "loss"
    item_s = 60.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        shape = "cpu" if not plan.on_gpu else "big" if plan.gpu_gib > BIG_GIB else "gpu"
        timings = {
            name: {"kind": "time", "shape": shape, "ceiling": plan.ceiling_tflops}
            for name in ("4 GEMM sweeps", *candidates())
            if plan.on_gpu or name != "policy: liger"  # Triton, for GPUs only
        }
        yield Phase(items=timings)
        yield Phase(items={f"error: {name}": {"kind": "error", "of": name} for name in GRADIENTS})
        if plan.on_gpu:
            yield Phase(
                items={
                    f"{how}: {strategy}": {"kind": how, "strategy": strategy}
                    for how in ("CUDA graph", "torch.compile")
                    for strategy in ("chunked", "tiled")
                }
            )

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        on = torch.device(device)
        if args["kind"] == "time":
            return [time_of(key, SHAPES[args["shape"]], args["ceiling"], on)]
        if args["kind"] == "error":
            return [error_of(args["of"], on)]
        capture = by_graph if args["kind"] == "CUDA graph" else by_compiler
        return [{"table": CAPTURE, "what": key, "text": capture(args["strategy"], on)}]


@cache
def states(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher and head, peaked like a language model's, in bfloat16; and sampled ids."""
    generator = torch.Generator(device=device).manual_seed(0)
    made = (x.bfloat16() for x in peers.peaked_states(*shape, generator))
    student, teacher, head = made
    ids = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
    return student.requires_grad_(), teacher, head, ids


def time_of(name: str, shape: Shape, ceiling: float | None, device: torch.device) -> Row:
    """One candidate's time and peak; a candidate that is not installed says so."""
    student, teacher, head, ids = states(shape, device)
    student.grad = head.grad = None
    repeats = 5 if device.type == "cuda" else 2
    if name == "4 GEMM sweeps":
        candidate = Candidate(forward=tiles)
        rows = 2048 if device.type == "cuda" else 32
        step: Callable[[], Any] = peers.gemm_floor(student, teacher, head, chunk_rows=rows)
    else:
        candidate = candidates()[name]
        head.requires_grad_(candidate.trains_head)
        step = partial(forward_backward, candidate.forward, student, teacher, head, ids)
    took = measure(name, step, device, repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what one candidate leaves must not fail the next
    student.grad = head.grad = None
    row: Row = {
        "table": candidate.table,
        "candidate": name,
        "N": shape.N,
        "V": shape.V,
        "H": shape.H,
        "ms": None,
        "peak MiB": None,
        "share": None,
        "text": took.text,
    }
    if took.median_s is not None:
        tflops = candidate.units * 2.0 * shape.N * shape.V * shape.H / took.median_s / 1e12
        row |= {"ms": 1e3 * took.median_s, "share": tflops / ceiling if ceiling else None}
    if took.peak_bytes is not None:
        row["peak MiB"] = took.peak_bytes / 2**20
    return row


def forward_backward(
    forward: Callable[..., Any], student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor
) -> str:
    """Run one step; returns what its statistics say."""
    student.grad = head.grad = None
    out = forward(student, teacher, head, ids)
    loss = out if out is None or isinstance(out, Tensor) else out.loss
    if loss is not None:
        loss.backward()
    stats = getattr(out, "stats", None)
    return f"{stats.strategy}, active {stats.active_frac:.2f}" if stats is not None else ""


def error_of(name: str, device: torch.device) -> Row:
    """Relative errors of bfloat16 gradients against float64 on the same rounded inputs."""
    student, teacher, head, ids = states(ERROR_SHAPES[device.type], device)
    row: Row = {"table": ERRORS, "candidate": name, "dh": None, "dW": None, "text": ""}
    of_student, of_teacher, of_head = (x.detach().double() for x in (student, teacher, head))
    try:
        with full_float32():
            reference = ours(strategy="reference")
            wanted = gradients(reference, of_student, of_teacher, of_head, ids)
            found = gradients(GRADIENTS[name], student.detach(), teacher, head.detach(), ids)
    except ImportError as error:
        return row | {"text": f"not installed: {error.name}"}
    for column, got, want in zip(("dh", "dW"), found, wanted, strict=True):
        # A mean over the tokens, as Liger has it, has the same relative error as a sum.
        scale = (got.double() * want).sum() / want.square().sum() if name == "liger" else 1.0
        row[column] = float((got.double() - scale * want).norm() / (scale * want).norm())
    return row


def gradients(
    forward: Callable[..., Any], student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor
) -> tuple[Tensor, ...]:
    leaves = student.clone().requires_grad_(), head.clone().requires_grad_()
    out = forward(leaves[0], teacher, leaves[1], ids)
    return torch.autograd.grad(out if isinstance(out, Tensor) else out.loss, leaves)


def by_graph(strategy: str, device: torch.device) -> str:
    """Capture a step in a CUDA graph, replay it, and compare the bits."""
    student, teacher, head, ids = states(ERROR_SHAPES["cuda"], device)
    leaf = student.detach().clone().requires_grad_()
    weight = head.detach().clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = span_divergence(leaf, teacher, weight, token_ids=ids, strategy=strategy)  # type: ignore[arg-type]
        return torch.autograd.grad(out.loss, (leaf, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            wanted = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = step()
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0][:200]}"
    graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    return "captured, same bits" if same else "captured, but other bits"


def by_compiler(strategy: str, device: torch.device) -> str:
    """Compile a function around the loss without a graph break, and run it forward and backward."""
    student, teacher, head, _ = states(ERROR_SHAPES["cuda"], device)
    leaf = student.detach().clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return span_divergence(2 * x, teacher, head.detach(), strategy=strategy).loss  # type: ignore[arg-type]

    try:
        torch.compile(loss, fullgraph=True)(leaf).backward()
    except Exception as error:
        return f"refused: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "compiled in one graph"


STAGE = Loss()
