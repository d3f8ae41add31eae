"""`make train`'s run on the device; its accuracy beside the CPU runs' in bench/results."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from day_one.results import Row
from day_one.stage import Phase, Plan, Stage

TREE = Path(__file__).parents[3]
RECORDED = TREE / "bench" / "results" / "quickstart.csv"
STEPS = 30
ACCURACY, TIMES = "Accuracy in percent", "Seconds"
SPLITS = ("dev", "ood")
HALF_WIDTHS = 2.0  # of the 95% interval; seldom exceeded by two runs of the same thing
STOP_S = 4.0  # for a run that is told to stop
MINIATURE = (
    "--steps 1 --sample.problems-per-step 4 --sample.group-size 4 --sample.max-new-tokens 64 "
    "--eval.problems 8 --eval.samples 1"
).split()


class Quickstart(Stage):
    name = "quickstart"
    item_s = 600.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        seconds = max(1.0, plan.seconds - 12)
        args = {"out": str(plan.out / "work" / "quickstart"), "seconds": seconds}
        yield Phase(items={"train": args})

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        out = Path(args["out"])
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "rosd_fast", "train", "--preset", "quickstart"]
        command += ["--device", device, "--out", str(out), "--name", "gpu", "--seed", "0"]
        command += ["--checkpoint.every", "0", *(MINIATURE if device == "cpu" else ())]
        start = time.monotonic()
        code, log = run_for(command, args["seconds"])
        seconds = time.monotonic() - start
        metrics = read_metrics(out / "gpu" / "metrics.jsonl")
        if not metrics:
            raise RuntimeError(f"exit status {code}: {log[-400:]}")
        # A miniature has problems and lengths of its own, so its accuracy is compared with nothing.
        recorded = read_recorded(RECORDED) if device == "cuda" else {}
        rows = [*accuracy_rows(metrics, recorded), *time_rows(metrics, seconds)]
        if code:
            rows.append({"table": ACCURACY, "split": f"the run ended with {code}", "ok": False})
        return rows


def run_for(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command for at most `seconds`; returns its exit status, 0 where time ended it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            output, _ = process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        return 0, output


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def accuracy_rows(
    metrics: list[dict[str, Any]], recorded: Mapping[tuple[str, int], list[float]]
) -> list[Row]:
    """Accuracy by split and step, beside the mean and range of the recorded CPU runs."""
    rows: list[Row] = []
    for metric in metrics:
        for split in SPLITS:
            name = f"eval/{split}/accuracy"
            if name not in metric:
                continue
            step, got = int(metric["step"]), 100 * float(metric[name])
            row: Row = {"table": ACCURACY, "split": split, "step": step, "here": got}
            cpu = recorded.get((split, step), [])
            if cpu:
                row["cpu mean"] = sum(cpu) / len(cpu)
                row["cpu range"] = f"{min(cpu):.1f} to {max(cpu):.1f}"
                row["allowed"] = allowed(cpu, metric, split)
                row["ok"] = abs(got - row["cpu mean"]) <= row["allowed"]
            rows.append(row)
    return rows


def allowed(cpu: list[float], metric: Mapping[str, Any], split: str) -> float:
    """How far an accuracy may be from the mean of the CPU's: intervals, and the seeds' spread."""
    low, high = (100 * metric[f"eval/{split}/accuracy_{end}"] for end in ("low", "high"))
    return HALF_WIDTHS * (high - low) / 2 + (max(cpu) - min(cpu)) / 2


def read_recorded(path: Path) -> dict[tuple[str, int], list[float]]:
    """(split, step) -> accuracy in percent of each seed's run on a CPU."""
    if not path.is_file():
        return {}
    found: dict[tuple[str, int], list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["split"], int(row["step"])
            found.setdefault(key, []).append(float(row["accuracy"]))
    return found


def time_rows(metrics: list[dict[str, Any]], seconds: float) -> list[Row]:
    """Mean seconds of the stages of a step, without the first one, and of the whole run."""
    steps = [m for m in metrics if int(m["step"]) > 0]
    counted = steps[1:] or steps
    names = sorted({name for m in counted for name in m if name.startswith("time/")})
    rows: list[Row] = [
        {"table": TIMES, "what": "run", "seconds": seconds},
        {"table": TIMES, "what": f"steps done, of {STEPS}", "seconds": float(len(steps))},
    ]
    for name in names:
        values = [float(m[name]) for m in counted if name in m]
        rows.append({"table": TIMES, "what": name, "seconds": sum(values) / len(values)})
    return rows


STAGE = Quickstart()
