"""Block sizes of the GEMM kernels per architecture.

Nothing is tuned at run time: a choice that depends on timings may differ between runs, and so would
the rounding of sums. `rosd_kernels.testing.aot` compiles every config for its architecture and
refuses spills and too much shared memory.

    sweep, pair, logprob_tile
                     [block_m rows] x [block_n vocabulary], reduced over block_k of the width
    grad_hidden      [block_m rows] x [block_n of the width], reduced over block_k of the vocabulary
    grad_head        [block_m vocabulary] x [block_n of the width], reduced over block_k rows
    gather_hidden, gather_head
                     the same of active entries, whose rows of the head are gathered

The devices of one family share a table: 80 serves all whose shared memory is small (86, 89, 120).
Triton before 3.8 keeps more values in registers; `OLDER` has smaller blocks for the kernels that
would spill there.

A lean problem has rows of aligned, even length and, where logits are computed, one head and no
bias, soft cap or clip, as with most models. Its blocks may be larger than those that support all
options.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Kernel = Literal[
    "sweep", "pair", "logprob_tile", "grad_hidden", "grad_head", "gather_hidden", "gather_head"
]
Precision = Literal["narrow", "tf32", "tf32x3", "ieee"]
FAMILIES = (80, 90, 100)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # that the gate compiles for
# What a block may take (CUDA's programming guide, "Technical Specifications per Compute
# Capability").
SHARED_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TMA_CAPABILITY = 90
OLD_TRITON = (3, 8)  # before it, `OLDER` applies


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
_32x128x32 = Config(32, 128, 32, 8, 2)
_64x128x16 = Config(64, 128, 16, 8, 2, max_registers=240)
_32x128x16 = Config(32, 128, 16, 8, 2)

# (lean problems, all others)
CONFIGS: dict[tuple[Kernel, int, Precision], tuple[Config, Config]] = {
    ("sweep", 80, "narrow"): (_128x128, _128x128),
    ("sweep", 90, "narrow"): (_128x256, _128x128),
    ("sweep", 100, "narrow"): (Config(128, 128, 64, 8, 3, max_registers=255), _64x128),
    # Left alone, the assembler takes 128 registers on 86, for two blocks at once, and spills; with
    # 255 it spills in the KLs.
    ("pair", 80, "narrow"): (
        Config(64, 128, 64, 8, 3, max_registers=240),
        Config(32, 128, 32, 8, 3),
    ),
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
    ("gather_hidden", 80, "narrow"): (_128x128, _64x128),
    ("gather_hidden", 90, "narrow"): (_128x256, _64x128),
    ("gather_hidden", 100, "narrow"): (_128x128, _64x128),
    ("gather_head", 80, "narrow"): (_128x128, _64x128),
    ("gather_head", 90, "narrow"): (_128x128, _64x128),
    ("gather_head", 100, "narrow"): (_128x128, _64x128),
}
_FLOATS: dict[Precision, tuple[Config, Config]] = {  # (pair, all other kernels)
    "tf32": (Config(64, 128, 32, 8, 2), Config(64, 128, 32, 8, 2)),
    "tf32x3": (_32x128x32, Config(64, 128, 32, 8, 2)),
    "ieee": (_32x128x16, Config(64, 128, 16, 8, 2)),
}
for _precision, (_pair, _other) in _FLOATS.items():
    for _arch in FAMILIES:
        CONFIGS["pair", _arch, _precision] = (_pair, _pair)
        for _kernel in (
            *("sweep", "logprob_tile", "grad_hidden", "grad_head"),
            *("gather_hidden", "gather_head"),
        ):
            CONFIGS[_kernel, _arch, _precision] = (_other, _other)


CONFIGS["pair", 80, "tf32"] = (Config(64, 128, 32, 8, 2), _32x128x32)  # spills with all options
# Left alone, the assembler takes 80 registers on 90, for three blocks at once, and spills.
for _arch in FAMILIES:
    CONFIGS["gather_head", _arch, "ieee"] = (_64x128x16, _64x128x16)


OLDER: dict[tuple[Kernel, int, Precision], tuple[Config, Config]] = {
    ("pair", 90, "narrow"): (_64x128, Config(64, 128, 64, 16, 3)),
    ("pair", 100, "narrow"): (_64x128, _64x128),
    ("sweep", 90, "ieee"): (_64x128x16, _64x128x16),
    ("sweep", 100, "ieee"): (_32x128x16, _32x128x16),
    ("sweep", 100, "tf32"): (_32x128x32, _32x128x32),
}

# Of the elementwise kernels: entries of a row that a program reads at once, warps, registers.
RowsConfig = tuple[int, int, int | None]
ROWS: RowsConfig = (2048, 8, None)
OLDER_ROWS: RowsConfig = (1024, 8, 64)  # left alone, the assembler takes 48 and spills
OLDER_SUMS_REGISTERS = 96  # of `scanned_sums`; left alone, the assembler takes 80 and spills


def family(capability: int) -> int:
    """Return the member of FAMILIES whose configs fit a device, also one that is not known yet.

    Only data-centre GPUs have the shared memory and tensor cores of 90 and 100. Consumer GPUs,
    including the later ones (120), use the configs of 80.
    """
    return {9: 90, 10: 100, 11: 100}.get(capability // 10, 80)


def shared_limit(capability: int) -> int:
    """What a block of a device may take; of a device that is not known, what its kind has."""
    kind = family(capability)
    return SHARED_BYTES.get(capability, SHARED_BYTES[86 if kind == 80 else kind])


@cache
def is_old_triton() -> bool:
    """Whether Triton is older than OLD_TRITON."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) < OLD_TRITON


def has_tma(capability: int) -> bool:
    """Whether operands are loaded through tensor descriptors."""
    if is_old_triton() and family(capability) == 80:  # spills up to 20 registers on 120
        return False
    return capability >= TMA_CAPABILITY


def select(kernel: Kernel, capability: int, precision: Precision, *, lean: bool) -> Config:
    """Return the config of a kernel on a device."""
    key = kernel, family(capability), precision
    older = OLDER.get(key) if is_old_triton() else None
    return (older or CONFIGS[key])[0 if lean else 1]


def sums_registers() -> int | None:
    """Registers of a thread of `scanned_sums`; None: the assembler decides."""
    return OLDER_SUMS_REGISTERS if is_old_triton() else None


def rows_config() -> RowsConfig:
    """Return ROWS or OLDER_ROWS."""
    return OLDER_ROWS if is_old_triton() else ROWS
