"""Is Triton's interpreter in use? It holds bf16 as bit patterns, which two helpers work around."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRET = tl.constexpr(INTERPRETED)  # as kernels may read it
