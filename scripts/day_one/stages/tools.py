"""compute-sanitizer on the smallest case, and ncu's counters of the kernels where it may read them.

The clocks stay as they are (`--clock-control none`): a machine may be shared with others.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from day_one.results import Row
from day_one.stage import Phase, Plan, Stage

SANITIZER, COUNTERS = "compute-sanitizer", "Counters"
CHECKERS = ("memcheck", "racecheck", "synccheck", "initcheck")
INFORMATION = ("initcheck",)  # libraries read what they have not written, too
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")
KERNELS = r"regex:(sweep|pair|rows|grad_hidden|grad_head|logprob)\w*kernel"
LAUNCHES = 12
METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__t_sector_hit_rate.pct": "L2 hit %",
    "launch__registers_per_thread": "registers",
}
NCU_SIZE = ("2048", "32768", "2048")


class Tools(Stage):
    name = "tools"
    item_s = 90.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        yield Phase(items={"memcheck": {}, "ncu": {}, **{name: {} for name in CHECKERS[1:]}})

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        if key == "ncu":
            return counters(device)
        return [sanitize(key, device)]


def tool(name: str) -> str | None:
    """The path of a CUDA tool; None where there is none."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(PLACES))


def sanitize(checker: str, device: str) -> Row:
    """Run the smallest case under a checker; without its cache, each allocation has its bounds."""
    row: Row = {"table": SANITIZER, "checker": checker}
    program = tool("compute-sanitizer")
    if program is None or device != "cuda":
        return row | {"text": "absent" if program is None else "absent: no GPU"}
    command = [program, "--tool", checker, "--error-exitcode", "9", "--print-limit", "5"]
    command += [sys.executable, "-m", "day_one.smallest", device]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    found = judged(done.returncode, done.stdout + done.stderr)
    if checker in INFORMATION:
        found.pop("ok", None)
    return row | found


def judged(code: int, output: str) -> Row:
    """What a checker's exit status and output say; `ok` only where it did check."""
    summary = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", output)
    last = [line.strip() for line in output.splitlines() if line.strip()][-1:] or [""]
    if "Device not supported" in output or (code not in (0, 9) and not summary):
        return {"text": f"could not run ({code}): {last[0][:200]}"}
    text = summary[-1] if summary else last[0]
    first = re.search(r"=========\s+((?:Invalid|Race|Uninitialized|Barrier|Error).*)", output)
    if code and first:
        text = f"{text}; {first.group(1)}"
    return {"text": text[:300], "ok": code == 0}


def counters(device: str) -> list[Row]:
    """ncu's counters of the first launches of our kernels."""
    program = tool("ncu")
    if program is None or device != "cuda":
        return [{"table": COUNTERS, "kernel": "absent" if program is None else "absent: no GPU"}]
    command = [program, "--csv", "--clock-control", "none", "--kernel-name", KERNELS]
    command += ["--launch-count", str(LAUNCHES), "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "day_one.smallest", device, *NCU_SIZE]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = read_counters(done.stdout)
    if rows:
        return rows
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
    text = lines[0] if lines else f"no counters ({done.returncode})"
    return [{"table": COUNTERS, "kernel": f"refused: {text[:200]}"}]


def read_counters(output: str) -> list[Row]:
    """The rows of ncu's CSV, one per launch."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    launches: dict[str, Row] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines))):
        row = launches.setdefault(
            line["ID"], {"table": COUNTERS, "kernel": line["Kernel Name"].split("(")[0]}
        )
        name = METRICS.get(line["Metric Name"])
        if name is not None:
            value = float(line["Metric Value"].replace(",", ""))
            row[name] = value / 1000 if name == "us" and line["Metric Unit"] in NANO else value
    return list(launches.values())


NANO = ("ns", "nsecond")

STAGE = Tools()
