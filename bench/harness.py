"""Shared parts of all benchmarks: alternating timing, the environment, and CSV records."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """The wall-clock seconds of repeated runs of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_frac(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s


def time_alternating(
    candidates: Mapping[str, Callable[[], T]], *, repeats: int, warmup: int = 1
) -> dict[str, tuple[Timing, list[T]]]:
    """Run the candidates in turn, `repeats` times each, and return their times and results by name.

    A machine that slows down, or is shared, then slows down all candidates equally.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    results: dict[str, list[T]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                times[name].append(elapsed)
                results[name].append(result)
    return {name: (Timing(tuple(times[name])), results[name]) for name in candidates}


def environment() -> dict[str, str]:
    """Return the machine, versions, commit and date as CSV columns."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": git_commit(),
    }


def machine() -> str:
    """Return the name of the processor, or the architecture if there is no /proc/cpuinfo."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Return the installed version of `package`, "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_commit() -> str:
    """Return the short commit, with a "+" if tracked files are modified; "" outside a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def record(path: Path, rows: Iterable[Mapping[str, object]]) -> Iterator[dict[str, Any]]:
    """Replace a CSV file with `rows`, and yield each row as it is written.

    Each row begins with the columns of `environment`. Rows written before a failure stay.
    """
    shared = environment()  # before the file is deleted, which would be a modified tracked file
    path.unlink(missing_ok=True)
    for row in rows:
        whole = {**shared, **row}
        append_row(path, whole)
        yield whole


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append `row` to a CSV file, with a header if the file is new.

    Raises ValueError if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = path.read_text().splitlines()[:1] if path.exists() else []
    if header and next(csv.reader(header)) != list(row):
        raise ValueError(f"{path} has other columns than this benchmark; move the file first")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if not header:
            writer.writeheader()
        writer.writerow(row)


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what a file has between two markers by `text`, on lines of its own.

    Raises ValueError if the file does not have each marker once.
    """
    before, *rest = path.read_text().split(begin)
    after = rest[0].split(end) if len(rest) == 1 else []
    if len(after) != 2:
        raise ValueError(f"{path}: want {begin} and {end} once each, in this order")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after[1]}")
