"""What a stage is, and the process that runs one: its items in order, each recorded at once.

python -m day_one.stage NAME --out DIR --device cuda|cpu --seconds S --identity JSON
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from day_one.crew import run_items, worker_command
from day_one.results import Item, Result, Row, load

GPU_GIB = "gpu memory GiB"
MARGIN_S = 2.0  # for the summary, before the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a stage's items depend on, besides the stage.

    results: the items' rows so far, by key; a later phase may read them.
    """

    device: str
    out: Path
    seconds: float
    results: Mapping[str, Item] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def ceiling_tflops(self) -> float | None:
        """The highest rate of a bfloat16 GEMM that the stage `machine` saw; None: not measured."""
        found = load(self.out, "machine")
        rates = [
            float(row["tflops"])
            for row in (found.rows if found else ())
            if row.get("precision") in ("bfloat16", "float32" if not self.on_gpu else "bfloat16")
            and row.get("tflops")
        ]
        return max(rates, default=None)

    @property
    def gpu_gib(self) -> float:
        """The GPU's memory as the stage `machine` saw it; 0 where it did not."""
        found = load(self.out, "machine")
        sizes = [
            row["value"] for row in (found.rows if found else ()) if row.get("what") == GPU_GIB
        ]
        return max(map(float, sizes), default=0.0)

    def workers(self, most: int, *, gib_each: float) -> int:
        """Processes that may share the GPU and the cores; one on a CPU."""
        if not self.on_gpu:
            return 1
        fitting = int(self.gpu_gib / gib_each) if self.gpu_gib else 1
        return max(1, min(most, len(os.sched_getaffinity(0)) // 2, fitting))


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Items that may run at the same time, on a number of workers.

    until: the part of the stage's time after which the next phase begins.
    """

    items: Mapping[str, Mapping[str, Any]]
    workers: int = 1
    until: float = 1.0


class Stage:
    """A stage: its items, what each does, and what all of them come to.

    item_s: time limit of an item in seconds.
    """

    name: str
    item_s: float = 120.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        """The items; a phase is asked for when the one before it is over."""
        raise NotImplementedError

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        """Measure an item, in a worker. An exception is the item's error."""
        raise NotImplementedError

    def summary(self, plan: Plan) -> list[Row]:
        """Rows made of all results. May write files into `plan.out`."""
        return []


def load_stage(name: str) -> Stage:
    return importlib.import_module(f"day_one.stages.{name}").STAGE


def kept_items(result: Result | None, identity: Mapping[str, str]) -> dict[str, Item]:
    """The results of an earlier run that still hold."""
    if result is None or not result.holds_for(identity):
        return {}
    return {key: item for key, item in result.items.items() if not item.error}


def run(stage: Stage, plan: Plan, identity: Mapping[str, str], command: Sequence[str]) -> Result:
    """Run a stage within `plan.seconds`; its file has the results at every moment."""
    start = time.monotonic()
    end = start + plan.seconds - MARGIN_S
    result = Result(stage=stage.name, identity=dict(identity), limit_s=round(plan.seconds, 1))
    result.items = kept_items(load(plan.out, stage.name), identity)
    plan = Plan(device=plan.device, out=plan.out, seconds=plan.seconds, results=result.items)
    result.save(plan.out)

    def done(key: str, item: Item) -> None:
        result.items[key] = item
        result.seconds = round(time.monotonic() - start, 1)
        result.save(plan.out)

    for phase in stage.phases(plan):
        items = {key: args for key, args in phase.items.items() if key not in result.items}
        result.left += run_items(
            items,
            done,
            command=command,
            log=plan.out / "work" / "logs" / f"{stage.name}.log",
            workers=phase.workers,
            item_s=stage.item_s,
            end=start + phase.until * (end - start),
        )
    result.summary = stage.summary(plan)
    result.state = "cut" if result.left else "done"
    result.seconds = round(time.monotonic() - start, 1)
    result.save(plan.out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--identity", type=json.loads, required=True)
    args = parser.parse_args()
    plan = Plan(device=args.device, out=args.out, seconds=args.seconds)
    run(load_stage(args.name), plan, args.identity, worker_command(args.name, args.device))


if __name__ == "__main__":
    main()
