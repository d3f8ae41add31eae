"""Candidates for the block sizes of the GEMM kernels, each checked and timed on a device.

A candidate may differ from the config in use in a few of its numbers, fits the shared memory of its
architecture, gives the results of the config in use within rounding, the same bits on repeat, and
spills no register. `scripts/gpu_day_one.sh` tries them; `gpu/tuned.py` reads what is chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from rosd_kernels.gpu import gradient, logprob_tiles, pair, sweep
from rosd_kernels.gpu.configs import LEAN_WIDTH, Config, Kernel, select, shared_limit
from rosd_kernels.gpu.launch import capability
from rosd_kernels.gpu.logprob_tiles import TritonLogprobTiles
from rosd_kernels.gpu.modes import INTERPRETED
from rosd_kernels.gpu.tiles import TritonTiles
from rosd_kernels.gpu.tuned import tuned, using
from rosd_kernels.logprob.records import LogprobInputs, LogprobOptions
from rosd_kernels.records import SpanInputs, SpanOptions
from rosd_kernels.testing.checking import Check, Shape, error_ratio
from rosd_kernels.testing.peers import peaked_states
from rosd_kernels.tiles import ROW_BLOCK, TILE, num_row_blocks, num_tiles

KERNELS: tuple[Kernel, ...] = ("sweep", "pair", "grad_hidden", "grad_head", "logprob_tile")
WITH_EXTRAS: tuple[Kernel, ...] = (
    "sweep",
    "pair",
    "logprob_tile",
)  # have configs that are not lean
FUNCTIONS: dict[Kernel, Any] = {
    "sweep": sweep.sweep_kernel,
    "pair": pair.pair_kernel,
    "grad_hidden": gradient.grad_hidden_kernel,
    "grad_head": gradient.grad_head_kernel,
    "logprob_tile": logprob_tiles.logprob_tile_kernel,
}
TOLERANCE = 1e-2  # of the largest element: bfloat16 results, rounded once
MOST_TILES = 256  # of the vocabulary in the gradients' chunk
RESERVE_BYTES = 2048  # of shared memory, for what is not an operand
MOST_ACCUMULATORS = 128  # float32 registers of a thread's accumulators
MOST_CHANGES = 2
RESOURCE_ERRORS = ("OutOfResources", "CompilationError", "PTXASError", "PassManagerError")


class Problem:
    """Operands of one step in bfloat16; `lean`: as with most models, else with a bias."""

    def __init__(self, shape: Shape, device: torch.device, *, lean: bool) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        student, teacher, head = (x.bfloat16() for x in peaked_states(*shape, generator))
        bias = None if lean else torch.randn(shape.V, generator=generator, device=device).bfloat16()
        ids = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
        inputs = SpanInputs.of(
            student_hidden=student,
            teacher_hidden=teacher,
            student_head=head,
            teacher_head=None,
            student_bias=bias,
            teacher_bias=bias,
            weights=None,
            token_ids=ids,
            rollout_logprobs=None,
        )
        self.shape, self.device, self.lean, self.ids = shape, device, lean, ids
        self.hidden, self.head = student, head
        self.tiles = TritonTiles(inputs, SpanOptions(), None)
        self.policy = TritonLogprobTiles(
            LogprobInputs.of(hidden=student, head=head, bias=bias, token_ids=ids),
            LogprobOptions(),
            None,
        )
        self.num_tiles = min(num_tiles(shape.V), MOST_TILES)
        blocks = num_row_blocks(shape.N)
        self.all = torch.ones(blocks, num_tiles(shape.V), dtype=torch.uint8, device=device)
        self.chunk = self.all[:, : self.num_tiles].contiguous()
        self.ones = torch.ones(shape.N, device=device)
        self.dh = torch.zeros(shape.N, shape.H, device=device)
        self.dW = torch.empty_like(head)

    @cached_property
    def lse(self) -> tuple[Tensor, Tensor]:
        """[N] normalizers of both sides."""
        return tuple(side.stats.lse.logsumexp(1) for side in self.tiles.sweep(None))  # type: ignore[return-value]

    @cached_property
    def grad(self) -> Tensor:
        """G of the chunk, [N, tiles * TILE] in bfloat16."""
        return self._grad_logits()

    def run(self, kernel: Kernel) -> list[Tensor]:
        """Launch a kernel for the whole problem, or the chunk; returns its results."""
        if kernel == "sweep":
            return [table for side in self.tiles.sweep(None) for table in side.stats]
        if kernel == "pair":
            needed = (True, True, not self.lean)
            return [*self.tiles.loss(self.all, *self.lse, needed), self._grad_logits()]
        if kernel == "logprob_tile":
            out = self._workspace()
            factors = self.ones.expand(3, -1).contiguous()
            rows = self.ids, self.lse[0], factors
            self.policy.grad_logits(self.chunk, *rows, first_tile=0, out=out)
            return [out]
        if kernel == "grad_hidden":
            self.dh.zero_()
            gradient.grad_hidden(self.grad, self.head, None, self.chunk, first_tile=0, out=self.dh)
            return [self.dh]
        assert kernel == "grad_head"
        out = {"out": self.dW, "out_bias": None, "vocab_size": self.shape.V}
        gradient.grad_head(self.grad, self.hidden, None, self.chunk, first_tile=0, **out)
        return [self.dW[: self.num_tiles * TILE]]

    def _grad_logits(self) -> Tensor:
        out = self._workspace()
        rows = self.chunk, self.ones * 0, self.ones
        gradient.grad_logits(self.tiles.pair, *self.lse, *rows, first_tile=0, out=out)
        return out

    def _workspace(self) -> Tensor:
        return self.hidden.new_empty(self.shape.N, self.num_tiles * TILE)


def current(kernel: Kernel, device: torch.device, *, lean: bool) -> Config:
    """The config in use for bfloat16 operands."""
    of = capability(device)
    return tuned(kernel, of, "narrow", lean=lean) or select(kernel, of, "narrow", lean=lean)


def candidates(kernel: Kernel, base: Config, arch_capability: int) -> list[Config]:
    """The config in use, then others, those first that differ in fewer numbers."""
    limit = shared_limit(arch_capability) - RESERVE_BYTES
    fitting = [
        config
        for config in _grid(kernel, base)
        if config == base or (shared_bytes(kernel, config) <= limit and _fits(kernel, config))
    ]
    return sorted(fitting, key=lambda config: _changes(config, base))


def _grid(kernel: Kernel, base: Config) -> Iterator[Config]:
    blocks_n = {"pair": (TILE,), "logprob_tile": (TILE,), "sweep": (TILE, 2 * TILE)}
    choices = itertools.product(
        (64, 128),
        blocks_n.get(kernel, (64, 128, 256)),
        (32, LEAN_WIDTH),
        (4, 8),
        (2, 3, 4, 5),
        (4, 8, 16),
    )
    yield base
    for block_m, block_n, block_k, warps, stages, group in choices:
        config = Config(block_m, block_n, block_k, warps, stages, base.max_registers, group)
        if config != base and _changes(config, base) <= MOST_CHANGES:
            yield config


def _changes(config: Config, base: Config) -> int:
    return sum(a != b for a, b in zip(astuple(config), astuple(base), strict=True))


def _fits(kernel: Kernel, config: Config) -> bool:
    sides = 2 if kernel == "pair" else 1
    accumulators = sides * config.block_m * config.block_n // (32 * config.num_warps)
    assert ROW_BLOCK % config.block_m == 0
    return 16 <= accumulators <= MOST_ACCUMULATORS


def shared_bytes(kernel: Kernel, config: Config) -> int:
    """Shared memory of the operands of all stages, 16 bits each."""
    rows = (2 if kernel == "pair" else 1) * config.block_m + config.block_n
    return 2 * config.num_stages * rows * config.block_k


def check(kernel: Kernel, config: Config, problem: Problem, base: Config) -> Check:
    """Compare a candidate with the config in use, and with a second call of itself."""
    name = f"{kernel} {config} g{config.group}"
    with using(kernel, base):
        wanted = [x.clone() for x in problem.run(kernel)]
    before = _compiled(kernel)
    try:
        with using(kernel, config):
            got = [x.clone() for x in problem.run(kernel)]
            again = problem.run(kernel)
    except Exception as error:
        if type(error).__name__ in RESOURCE_ERRORS:
            return Check(name, False, f"does not fit: {str(error).splitlines()[0][:120]}")
        raise
    if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        return Check(name, False, "a second call gave other bits")
    worst = max(
        error_ratio(a, b.double(), TOLERANCE, 1e-5) for a, b in zip(got, wanted, strict=True)
    )
    if worst > 1:
        return Check(name, False, f"wrong: {worst:.1f} times the allowed error")
    registers, spills = _usage(_compiled(kernel) - before)
    if spills and config != base:  # what is in use is timed in any case
        return Check(name, False, f"spills {spills} registers")
    return Check(name, True, f"{registers} registers" if registers else "")


def timed_call(kernel: Kernel, config: Config, problem: Problem) -> Callable[[], Any]:
    """A call that launches the kernel with a candidate, for a clock."""

    def call() -> None:
        with using(kernel, config):
            problem.run(kernel)

    problem.run(kernel)  # makes what the kernel reads
    return call


def table_entry(
    kernel: Kernel, config: Config, *, arch_capability: int, lean: bool, **notes: Any
) -> dict[str, Any]:
    """An entry of tuned.json."""
    return {
        "kernel": kernel,
        "capability": arch_capability,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "precision": "narrow",
        "lean": lean,
        "block_m": config.block_m,
        "block_n": config.block_n,
        "block_k": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "max_registers": config.max_registers,
        "group": config.group,
        **notes,
    }


def _compiled(kernel: Kernel) -> set[Any]:
    """The binaries that a kernel has loaded in this process; none in the interpreter."""
    if INTERPRETED:
        return set()
    try:
        caches = FUNCTIONS[kernel].device_caches.values()
        return {binary for cache in caches for binary in cache[0].values()}
    except (AttributeError, TypeError, IndexError):  # Triton keeps them elsewhere
        return set()


def _usage(binaries: set[Any]) -> tuple[int, int]:
    """(registers per thread, spilled ones), the largest of the binaries."""
    registers = [getattr(binary, "n_regs", 0) or 0 for binary in binaries]
    spills = [getattr(binary, "n_spills", 0) or 0 for binary in binaries]
    return max(registers, default=0), max(spills, default=0)
