"""Every check of `rosd-fast doctor --gpu`, spread over processes: most of its time compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from day_one.results import Row
from day_one.stage import Phase, Plan, Stage
from rosd_kernels.testing.addresses import LARGE, NEEDED_GIB, check_addresses
from rosd_kernels.testing.checking import SHAPES, SMALL, Shape
from rosd_kernels.testing.parts import Part, parts

STRATEGIES = ("chunked", "tiled")
CHECKS = "Checks against float64"
MOST_WORKERS, GIB_EACH = 8, 2.0
# In the interpreter: shapes of one and of two row blocks, and of them one check in ten.
SMALL_SHAPES = (Shape(9, 300, 20), Shape(130, 256, 16))
SMALLER = (Shape(1, 7, 3), Shape(0, 30, 8))
ONE_IN = 10


class Numerics(Stage):
    name = "numerics"
    item_s = 120.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        names = list(checks(plan.device))
        if not plan.on_gpu:
            names = names[::ONE_IN]
        workers = plan.workers(MOST_WORKERS, gib_each=GIB_EACH)
        yield Phase(items={name: {} for name in names}, workers=workers)
        if not plan.on_gpu or plan.gpu_gib >= NEEDED_GIB:  # one at a time: they fill the memory
            large = LARGE if plan.on_gpu else Shape(9, 300, 20)
            items = {
                f"addresses {strategy}": {"strategy": strategy, "shape": large}
                for strategy in STRATEGIES
            }
            yield Phase(items=items)

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        on = torch.device(device)
        if "strategy" in args:
            check = check_addresses(on, args["strategy"], Shape(*args["shape"]))
        else:
            check = checks(device)[key](on)
        return [{"table": CHECKS, "check": check.name, "text": check.text, "ok": check.ok}]


@cache
def checks(device: str) -> dict[str, Part]:
    return parts(SHAPES, SMALL) if device == "cuda" else parts(SMALL_SHAPES, SMALLER)


STAGE = Numerics()
