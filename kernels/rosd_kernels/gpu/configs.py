"""Block sizes of the GEMM kernels per architecture.

Nothing is tuned at run time: a choice that depends on timings may differ between runs, and so would
the rounding of sums. `rosd_kernels.testing.aot` compiles every config for its architecture and
refuses spills and too much shared memory.

    sweep, pair, logprob_tile
                     [block_m rows] x [block_n vocabulary], reduced over block_k of the width
    grad_hidden      [block_m rows] x [block_n of the width], reduced over block_k of the vocabulary
    grad_head        [block_m vocabulary] x [block_n of the width], reduced over block_k rows

A lean problem has rows of aligned, even length and, where logits are computed, one head and no
bias, soft cap or clip, as with most models. Its blocks may be larger than those that support all
options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["sweep", "pair", "logprob_tile", "grad_hidden", "grad_head"]
Precision = Literal["narrow", "tf32", "tf32x3", "ieee"]
ARCHITECTURES = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


LEAN_WIDTH = 64  # a multiple of each block_k along the width


@dataclass(frozen=True, slots=True)
class Config:
    """Block sizes of the table above, and how a kernel is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None: the assembler decides
    group: int = 8  # row blocks that share a column in L2

    def __str__(self) -> str:
        blocks = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{blocks} w{self.num_warps} s{self.num_stages}"


_128x256 = Config(128, 256, 64, 8, 3)
_128x128 = Config(128, 128, 64, 8, 3)
_64x128 = Config(64, 128, 64, 8, 3)

# (lean problems, all others)
CONFIGS: dict[tuple[Kernel, int, Precision], tuple[Config, Config]] = {
    ("sweep", 80, "narrow"): (_128x128, _128x128),
    ("sweep", 90, "narrow"): (_128x256, _128x128),
    ("sweep", 100, "narrow"): (Config(128, 128, 64, 8, 3, max_registers=255), _64x128),
    ("pair", 80, "narrow"): (_64x128, Config(64, 128, 32, 8, 3)),
    ("pair", 90, "narrow"): (_128x128, _64x128),
    ("pair", 100, "narrow"): (_128x128, _64x128),
    ("logprob_tile", 80, "narrow"): (_128x128, _64x128),
    ("logprob_tile", 90, "narrow"): (_128x128, _64x128),
    ("logprob_tile", 100, "narrow"): (_128x128, _64x128),
    ("grad_hidden", 80, "narrow"): (_128x128, _64x128),
    ("grad_hidden", 90, "narrow"): (_128x256, _64x128),
    ("grad_hidden", 100, "narrow"): (_128x128, _64x128),
    ("grad_head", 80, "narrow"): (_128x128, _128x128),
    ("grad_head", 90, "narrow"): (_128x256, _128x256),
    ("grad_head", 100, "narrow"): (_128x256, _128x256),
}
_FLOATS: dict[Precision, tuple[Config, Config]] = {  # (pair, all other kernels)
    "tf32": (Config(64, 128, 32, 8, 2), Config(64, 128, 32, 8, 2)),
    "tf32x3": (Config(32, 128, 32, 8, 2), Config(64, 128, 32, 8, 2)),
    "ieee": (Config(32, 128, 16, 8, 2), Config(64, 128, 16, 8, 2)),
}
for _precision, (_pair, _other) in _FLOATS.items():
    for _arch in ARCHITECTURES:
        CONFIGS["pair", _arch, _precision] = (_pair, _pair)
        for _kernel in ("sweep", "logprob_tile", "grad_hidden", "grad_head"):
            CONFIGS[_kernel, _arch, _precision] = (_other, _other)


def architecture(capability: int) -> int:
    """Return the member of ARCHITECTURES whose configs fit a device.

    Only data-centre GPUs have the shared memory and tensor cores of 90 and 100. Consumer GPUs,
    including the later ones (120), use the configs of 80.
    """
    return {9: 90, 10: 100, 11: 100}.get(capability // 10, 80)


def select(kernel: Kernel, capability: int, precision: Precision, *, lean: bool) -> Config:
    """Return the config of a kernel on a device."""
    return CONFIGS[kernel, architecture(capability), precision][0 if lean else 1]
