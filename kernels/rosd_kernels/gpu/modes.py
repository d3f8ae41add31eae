"""Whether Triton's interpreter is in use, whose handling of bf16 two helpers work around."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRET = tl.constexpr(INTERPRETED)  # the same, readable in kernels
