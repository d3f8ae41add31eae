"""Block sizes of the GEMM kernels per architecture; the first that fits the device is taken.

Nothing is tuned at run time: a choice that depends on timings may differ between runs, and with it
the order of sums. Every config here is compiled for its architecture by `rosd_kernels.aot`, which
refuses spills and too much shared memory.

    sweep, pair      [block_m rows] x [block_n vocabulary], reduced over block_k of the width
    grad_hidden      [block_m rows] x [block_n of the width], reduced over block_k of the vocabulary
    grad_head        [block_m vocabulary] x [block_n of the width], reduced over block_k rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["sweep", "pair", "grad_hidden", "grad_head"]
Precision = Literal["narrow", "tf32", "tf32x3", "ieee"]
ARCHITECTURES = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True, slots=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8  # row blocks that share a column in L2

    def __str__(self) -> str:
        blocks = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{blocks} w{self.num_warps} s{self.num_stages}"


CONFIGS: dict[tuple[Kernel, int, Precision], list[Config]] = {
    ("sweep", 80, "narrow"): [Config(128, 128, 64, 8, 3)],
    ("sweep", 90, "narrow"): [Config(128, 256, 64, 8, 3)],
    ("sweep", 100, "narrow"): [Config(128, 128, 64, 8, 3)],
    ("pair", 80, "narrow"): [Config(128, 128, 64, 8, 2)],
    ("pair", 90, "narrow"): [Config(128, 128, 64, 8, 3)],
    ("pair", 100, "narrow"): [Config(128, 128, 64, 8, 3)],
    ("grad_hidden", 80, "narrow"): [Config(128, 128, 64, 8, 3)],
    ("grad_hidden", 90, "narrow"): [Config(128, 256, 64, 8, 3)],
    ("grad_hidden", 100, "narrow"): [Config(128, 256, 64, 8, 3)],
    ("grad_head", 80, "narrow"): [Config(128, 128, 64, 8, 3)],
    ("grad_head", 90, "narrow"): [Config(128, 256, 64, 8, 3)],
    ("grad_head", 100, "narrow"): [Config(128, 256, 64, 8, 3)],
}
for _kernel in ("sweep", "pair", "grad_hidden", "grad_head"):
    for _arch in ARCHITECTURES:
        for _precision in ("tf32", "tf32x3", "ieee"):
            CONFIGS[_kernel, _arch, _precision] = [Config(64, 128, 32, 8, 2)]


def architecture(capability: int) -> int:
    """The newest architecture of the table that the device understands."""
    return max((arch for arch in ARCHITECTURES if arch <= capability), default=ARCHITECTURES[0])


def select(
    kernel: Kernel,
    capability: int,
    precision: Precision,
    *,
    shared_bytes: int | None,
    itemsize: int,
) -> Config:
    """The first config that fits `shared_bytes` (None: the architecture's), or else the last."""
    arch = architecture(capability)
    configs = CONFIGS[kernel, arch, precision]
    return configs[0]
