"""Record on a CPU what the launchers would compile on a GPU; nothing runs.

The package's own code is called with CPU tensors while Triton believes that a device of some
architecture is active. Triton's pre-compilation hook then sees the signature, constants and
alignments as they are specialised on such a device, records them and refuses to compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from rosd_kernels.gpu import logprob_sparse
from rosd_kernels.gpu.configs import Kernel, Precision
from rosd_kernels.gpu.entries import active_index, mass_threshold, tile_stats
from rosd_kernels.gpu.gather import gather_bias, gather_head, gather_hidden
from rosd_kernels.gpu.launch import DOT_PRECISIONS
from rosd_kernels.gpu.logprob import logprob_grad, logprob_stats
from rosd_kernels.gpu.logprob_tiles import TritonLogprobTiles
from rosd_kernels.gpu.rows import rows
from rosd_kernels.gpu.sparse_rows import scanned_sums, write_grad
from rosd_kernels.gpu.tiles import TritonTiles
from rosd_kernels.logprob.records import LogprobInputs, LogprobOptions
from rosd_kernels.records import Divergence, SpanInputs, SpanOptions
from rosd_kernels.sparsity import entry, mass
from rosd_kernels.tiles import SCAN_TILE, num_row_blocks, num_tiles

N = 160
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A problem whose kernels differ from those of the other variants."""

    name: str
    hidden: torch.dtype = torch.bfloat16
    head: torch.dtype = torch.bfloat16
    divergence: Divergence = "jsd"
    beta: float = 0.3
    V: int = 2176  # a multiple of 16, as with most models
    H: int = 512
    everything: bool = False  # biases, soft cap, clip, a teacher with its own head
    ordered: bool = False


NARROW = (
    Variant(name="plain"),
    Variant(name="everything", everything=True),
    Variant(name="ordered", ordered=True),
    Variant(name="ragged", V=2173, H=250),
    Variant(name="forward_kl", divergence="forward_kl"),
    Variant(name="reverse_kl", divergence="reverse_kl"),
    Variant(name="skewed", beta=0.999),
    Variant(name="kl, everything", divergence="reverse_kl", everything=True),
)
WIDE = (
    Variant(name="plain", hidden=torch.float32, head=torch.float32),
    Variant(name="everything", hidden=torch.float32, head=torch.float32, everything=True),
    Variant(name="mixed", head=torch.float32),
    Variant(name="mixed, ordered", head=torch.float32, ordered=True),
)
VARIANTS: dict[Precision, tuple[Variant, ...]] = {
    "narrow": NARROW,
    "tf32": WIDE,
    "tf32x3": WIDE,
    "ieee": WIDE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One compilation, e.g. of the sweep for arch 90 and the variant "plain"."""

    kernel: str  # as the table names it: "sweep", "pair loss", "rows", ...
    gemm: Kernel | None  # its name in configs.py
    arch: int
    precision: Precision
    variant: str
    module: str
    function: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @property
    def named(self) -> dict[str, Any]:
        """Constants by the names of the kernel's parameters."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constants.items()}

    @property
    def blocks(self) -> str:
        """Like `str(Config)`, also for kernels without a Config."""
        constants = self.named
        names = [name for name in constants if name.startswith("BLOCK_")]
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        return f"{'x'.join(str(constants[name]) for name in names)} w{warps} s{stages}"


def jobs(arch: int, precisions: Iterable[Precision] = tuple(VARIANTS)) -> list[Job]:
    """All distinct compilations for an architecture."""
    found: dict[str, Job] = {}
    for precision in precisions:
        for variant in VARIANTS[precision]:
            for job in record(arch, precision, variant):
                parts = (job.function, job.signature, job.constants, job.attributes, job.options)
                found.setdefault(repr(parts), job)
    return list(found.values())


def record(arch: int, precision: Precision, variant: Variant) -> list[Job]:
    """The compilations that one step of "tiled" and one of "chunked" request, of each function."""
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    found: list[Job] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = list(compile["signature"])
        constants = {names[path[0]]: value for path, value in compile["constants"].items()}
        options = json.loads(compile["specialization_data"])["options"]
        kernel = fn.name.removesuffix("_kernel")
        gemm = kernel if "PRECISION" in constants else None
        if kernel == "pair":
            kernel = "pair grad" if constants["WRITE_GRADIENT"] else "pair loss"
        found.append(
            Job(
                kernel=kernel,
                gemm=gemm,
                arch=arch,
                precision=precision,
                variant=variant.name,
                module=fn.module,
                function=fn.name,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                options={name: options[name] for name in OPTIONS},
            )
        )
        return True  # do not compile, hence do not launch

    with _pretend(arch, precision), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        _step(variant)
        if variant.divergence == "jsd":  # the others differ in nothing else
            _logprob_step(variant)
    return found


class _Device:
    """The part of a Triton driver that is used before a compilation."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # the key of Triton's cache of devices

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _pretend(arch: int, precision: Precision) -> Iterator[None]:
    before, active = torch.get_float32_matmul_precision(), driver._active
    names = {of: name for name, of in DOT_PRECISIONS.items()}
    driver.set_active(_Device(arch))
    torch.set_float32_matmul_precision(names.get(precision, "highest"))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        driver.set_active(active)


def _step(variant: Variant) -> None:
    """Launch everything that a problem of the variant launches."""
    V, H, everything = variant.V, variant.H, variant.everything
    Ht = H + 128 if everything else H
    bias = torch.zeros(V, dtype=variant.head) if everything else None
    inputs = SpanInputs.of(
        student_hidden=torch.zeros(N, H, dtype=variant.hidden),
        teacher_hidden=torch.zeros(N, Ht, dtype=variant.hidden),
        student_head=torch.zeros(V, H, dtype=variant.head),
        teacher_head=torch.zeros(V, Ht, dtype=variant.head) if everything else None,
        student_bias=bias,
        teacher_bias=bias,
        weights=None,
        token_ids=torch.zeros(N, dtype=torch.int64),
        rollout_logprobs=None,
    )
    options = SpanOptions(
        divergence=variant.divergence,
        beta=variant.beta,
        softcap=30.0 if everything else None,
        entry_clip=0.1 if everything else None,
    )
    tiles = TritonTiles(inputs, options, torch.arange(V) if variant.ordered else None)
    active = torch.ones(num_row_blocks(N), num_tiles(V), dtype=torch.uint8)
    lse, needed = torch.zeros(N), (True, True, bias is not None)
    student, teacher = tiles.sweep(inputs.token_ids)
    for rule in (entry(2**-12), mass(1e-3)):
        tiles.select(student.stats, teacher.stats, lse, lse, rule)
    tiles.loss(active, lse, lse, needed)
    tiles.gradients(active, lse, lse, lse, lse, needed)
    if variant.head == torch.bfloat16 and not variant.ordered:  # logits are float32 in any case
        _rows(torch.zeros(2, N, V), inputs.transforms(options)[0].bias, inputs.token_ids, options)
    if not variant.ordered:
        _sparse(inputs, options, needed)


def _rows(
    logits: Tensor, bias: Tensor | None, columns: Tensor | None, options: SpanOptions
) -> None:
    """Launch the single pass of a whole vocabulary, and the passes of a shard."""
    statistics = torch.zeros(2, N)
    stages = ("all", "value", "stats", "terms", "grad")
    for stage in stages if options.divergence == "jsd" else stages[:1]:
        has_stats = stage in ("all", "value", "stats")
        rows(
            *logits,
            bias,
            bias,
            columns,
            options,
            stage=stage,
            lse=None if has_stats else statistics,
            total=statistics[0] if stage == "grad" else None,
        )


def _sparse(inputs: SpanInputs, options: SpanOptions, needed: tuple[bool, bool, bool]) -> None:
    """Launch the passes over kept logits with a sparsity, and their GEMMs."""
    V, H = inputs.student_head.shape
    student, teacher = torch.zeros(2, N, V)
    transforms, lse = inputs.transforms(options), torch.zeros(2, N)
    is_narrow = inputs.student_hidden.dtype == inputs.student_head.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_narrow else torch.float32
    tile_stats(student, transforms[0])
    mass_threshold(student, transforms[0], lse[0], 1e-3)
    scanned = torch.ones(N, num_tiles(V, SCAN_TILE), dtype=torch.bool)
    index = active_index((student, teacher), transforms, lse, scanned)
    scanned_sums(student, teacher, transforms, lse, scanned, index, options)
    G = write_grad(student, teacher, transforms, lse, lse[0], index, options, dtype=dtype)
    gather_hidden(G, inputs.student_head, index, lse[0], out=torch.zeros(N, H))
    gather_head(G, inputs.student_hidden.to(dtype), index, out=torch.zeros(V, H))
    if needed[2]:
        gather_bias(G, index, lse[0], out=torch.zeros(V))


def _logprob_step(variant: Variant) -> None:
    """Launch everything that `span_logprob` launches on a problem of the variant."""
    V, H, everything = variant.V, variant.H, variant.everything
    inputs = LogprobInputs.of(
        hidden=torch.zeros(N, H, dtype=variant.hidden),
        head=torch.zeros(V, H, dtype=variant.head),
        bias=torch.zeros(V, dtype=variant.head) if everything else None,
        token_ids=torch.zeros(N, dtype=torch.int64),
    )
    options = LogprobOptions(softcap=30.0 if everything else None)
    tiles = TritonLogprobTiles(inputs, options, torch.arange(V) if variant.ordered else None)
    active = torch.ones(num_row_blocks(N), num_tiles(V), dtype=torch.uint8)
    lse, factors = torch.zeros(N), torch.zeros(3, N)
    tiles.sweep(inputs.token_ids)
    needed = (True, True, everything)
    tiles.gradients(active, inputs.token_ids, lse, factors, needed)
    if variant.head == torch.bfloat16 and not variant.ordered:  # logits are float32 in any case
        logits, columns, transform = torch.zeros(N, V), inputs.token_ids, inputs.transform(options)
        logprob_stats(logits, transform, columns)
        for out in (logits, torch.zeros(N, V, dtype=torch.bfloat16)):
            logprob_grad(logits, transform, columns, lse, factors, out=out)
        scanned = torch.ones(N, num_tiles(V, SCAN_TILE), dtype=torch.bool)
        index = active_index((logits,), (transform,), lse[None], scanned, columns)
        logprob_sparse.dropped_mass(logits, transform, lse, scanned, index)
        for dtype in (torch.bfloat16, torch.float32):
            rows = columns, lse, factors
            logprob_sparse.write_grad(logits, transform, *rows, index, dtype=dtype)
