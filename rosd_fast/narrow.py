"""What bfloat16 costs and gains on a CPU.

torch has no product of bfloat16 operands on a CPU that returns its float32 sums. The losses need
them: logits rounded to bfloat16 cost 5% of the gradient (docs/kernels.md, Numbers). So the losses
convert to float32 there, whatever the CPU can do, and only the model's layers compute in bfloat16.
"""

from __future__ import annotations

import time
from functools import cache

ROWS, WIDTH = 128, 512
BUDGET_S = 0.04  # after which a measurement begins no further round
ROUNDS = 6  # the first one prepares the products


def units() -> str | None:
    """The CPU's instructions for bfloat16 products; None: it converts them to float32."""
    import torch

    for name, test in (
        ("AMX", "_is_amx_tile_supported"),
        ("AVX512-BF16", "_is_avx512_bf16_supported"),
    ):
        supported = getattr(torch.cpu, test, None)
        if supported is not None and supported():
            return name
    return None


@cache
def gain() -> float:
    """How many times as fast a product of bfloat16 operands is as one of float32, here and now.

    Measured once per process, in turns, on [128, 512] times [512, 512].
    """
    import torch

    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    operands = {
        dtype: (torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype))
        for dtype in seconds
    }
    with torch.inference_mode():
        begun = time.perf_counter()
        for _ in range(ROUNDS):
            for dtype, pair in operands.items():
                start = time.perf_counter()
                torch.mm(*pair)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
            if time.perf_counter() - begun > BUDGET_S:
                break
    return seconds[torch.float32] / seconds[torch.bfloat16]


def about_bfloat16() -> str:
    """One line: the instructions, the measured gain, and what is computed in float32 anyway."""
    found, times = units(), gain()
    by = f"with {found}" if found else "without instructions for it"
    speed = f"{times:.1f} times as fast" if times >= 1 else f"{1 / times:.1f} times as slow"
    return f"{by}, products of layers are {speed} as in float32; the losses compute in float32"
