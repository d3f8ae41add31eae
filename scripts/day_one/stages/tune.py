"""Block sizes: candidates are compiled and checked in parallel, then timed one after the other.

The winners go to tuned.json in the folder of results, in the form that gpu/tuned.py reads.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from day_one.results import Item, Row
from day_one.stage import Phase, Plan, Stage
from day_one.timing import timed
from rosd_fast.files import write_atomic
from rosd_kernels.testing.checking import SIZE, Shape

if TYPE_CHECKING:
    from rosd_kernels.gpu.configs import Kernel

FILE = "tuned.json"
CANDIDATES, WINNERS = "Candidates", "Chosen"
GAIN = 0.03  # of its time, that a config must win
MOST_WORKERS, GIB_EACH = 8, 9.0
CHECKED_UNTIL = 0.65  # of the stage's time: what has passed until then is timed
# The small problem compiles what the large one launches: N is no part of a kernel's specialization.
SMALL_N = 256
SHAPES = {"cuda": Shape(8192, SIZE.V, SIZE.H), "cpu": Shape(130, 256, 64)}
MOST = {"cuda": 24, "cpu": 2}  # candidates of a kernel
CHECK, TIME = "check", "time"


class Tune(Stage):
    name = "tune"
    item_s = 60.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        if importlib.util.find_spec("triton") is None:
            return
        shape = SHAPES[plan.device]
        workers = plan.workers(MOST_WORKERS, gib_each=GIB_EACH)
        yield Phase(items={"list": {"most": MOST[plan.device], "shape": shape}})
        listed = plan.results.get("list")
        rows = listed.rows if listed else []
        items = {row["_key"]: row["_args"] for row in rows if "_key" in row}
        small = Shape(min(SMALL_N, shape.N), shape.V, shape.H)
        yield Phase(
            items={f"{CHECK} {key}": {**args, "shape": small} for key, args in items.items()},
            workers=workers,
            until=CHECKED_UNTIL,
        )
        good = {key: args for key, args in items.items() if passed(plan.results, key)}
        yield Phase(items={f"{TIME} {key}": {**args, "shape": shape} for key, args in good.items()})

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        on = torch.device(device)
        if key == "list":
            return listing(args["most"], on)
        problem = problem_of(Shape(*args["shape"]), args["lean"], device)
        from rosd_kernels.gpu.configs import Config
        from rosd_kernels.testing import tuning

        config, kernel = Config(*args["config"]), args["kernel"]
        row: Row = {"table": CANDIDATES, "kernel": kernel, "lean": args["lean"]}
        row |= {"config": f"{config} g{config.group}", "ms": None, "text": ""}
        if key.startswith(CHECK):
            base = Config(*args["base"])
            found = tuning.check(kernel, config, problem, base)
            wrong = found.text.startswith(("wrong", "a second call"))
            if found.ok:
                return [{"_good": True, "_text": found.text}]
            row["text"] = found.text
            return [row | {"ok": False}] if wrong else [row]
        took = timed(tuning.timed_call(kernel, config, problem), on, limit_s=0.3, most=20)
        row |= {"ms": 1e3 * took.median_s, "spread": took.spread}
        return [row | {"_args": {k: v for k, v in args.items() if k != "shape"}}]

    def summary(self, plan: Plan) -> list[Row]:
        """Write tuned.json, and what it changes."""
        if importlib.util.find_spec("triton") is None:
            return [{"table": WINNERS, "kernel": "Triton is absent: nothing to tune"}]
        entries, rows = winners(plan.results, on_gpu=plan.on_gpu)
        write_atomic(plan.out / FILE, (json.dumps({"entries": entries}, indent=1) + "\n").encode())
        return rows


@cache
def problem_of(shape: Shape, lean: bool, device: str) -> Any:
    from rosd_kernels.testing.tuning import Problem

    return Problem(shape, torch.device(device), lean=lean)


def listing(most: int, device: torch.device) -> list[Row]:
    """All candidates, as hidden rows: the first of every kernel, then the second, and so on."""
    from rosd_kernels.gpu.launch import capability
    from rosd_kernels.testing import tuning

    of, lists = capability(device), []
    kinds: list[tuple[Kernel, bool]] = [(kernel, True) for kernel in tuning.KERNELS]
    kinds.extend((kernel, False) for kernel in tuning.WITH_EXTRAS)
    for kernel, lean in kinds:
        base = tuning.current(kernel, device, lean=lean)
        lists.append(
            [
                {
                    "_key": f"{kernel} {'lean' if lean else 'extras'} {config} g{config.group}",
                    "_args": {
                        "kernel": kernel,
                        "lean": lean,
                        "config": astuple(config),
                        "base": astuple(base),
                        "capability": of,
                    },
                }
                for config in tuning.candidates(kernel, base, of)[:most]
            ]
        )
    return [row for rank in zip_longest(*lists) for row in rank if row is not None]


def passed(results: Mapping[str, Item], key: str) -> bool:
    item = results.get(f"{CHECK} {key}")
    return item is not None and any(row.get("_good") for row in item.rows)


def winners(results: Mapping[str, Item], *, on_gpu: bool) -> tuple[list[dict[str, Any]], list[Row]]:
    """(entries of tuned.json, rows): the fastest config of each kernel, where it wins enough."""
    from rosd_kernels.gpu.configs import Config
    from rosd_kernels.testing.tuning import table_entry

    times: dict[tuple[str, bool], list[Row]] = {}
    for key, item in results.items():
        if key.startswith(TIME):
            for row in item.rows:
                times.setdefault((row["kernel"], row["lean"]), []).append(row)
    entries, rows = [], []
    for (kernel, lean), timed_rows in times.items():
        was = next((r for r in timed_rows if r["_args"]["config"] == r["_args"]["base"]), None)
        if was is None:
            continue
        best = min(timed_rows, key=lambda row: row["ms"])
        gain = 1 - best["ms"] / was["ms"]
        chosen = best if gain >= GAIN else was
        rows.append(
            {
                "table": WINNERS,
                "kernel": kernel,
                "lean": lean,
                "tried": len(timed_rows),
                "was": was["config"],
                "was ms": was["ms"],
                "chosen": chosen["config"],
                "ms": chosen["ms"],
            }
        )
        if chosen is not was:
            # A table made in the interpreter is for no device: no GPU has the capability 0.
            capability = best["_args"]["capability"] if on_gpu else 0
            config = Config(*best["_args"]["config"])
            entries.append(
                table_entry(
                    kernel,  # type: ignore[arg-type]
                    config,
                    arch_capability=capability,
                    lean=lean,
                    ms=round(best["ms"], 4),
                    was_ms=round(was["ms"], 4),
                )
            )
    return entries, rows


STAGE = Tune()
