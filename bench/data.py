"""Start-up time and memory of data sets of 1,000 to 1,000,000 rows, as a run loads them.

    python bench/data.py                        # all cases; rewrites the CSV
    python bench/data.py --rows 1000 100000 --csv /tmp/data.csv

The rows are word problems of about 400 bytes with numbers as answers, written to a temporary folder
as JSON lines, CSV and parquet. Each case is a process of its own, with the options' defaults:

    load       `load_problems`: index, shape, `data.check_rows` rows checked
    batch      the first batch of a shuffled `ProblemStream`, and the median of the next hundred
    peak       of resident memory meanwhile, beyond that before; mapped pages of files count
    kept       what stays resident, per row
    start      `load_datasets` with the default data.dev and data.overlap: drop, which also
               reads each row for its key, as no problem is in two splits

Times are of the wall clock, and of the processor where the column says so: other programs count in
the former alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS, record
from loss import resident

from rosd_fast.config import DataConfig
from rosd_fast.data.datasets import load_datasets
from rosd_fast.data.problems import load_problems
from rosd_fast.data.stream import ProblemStream
from rosd_fast.quickstart.tasks import KINDS

SIZES = (1_000, 100_000, 1_000_000)
FORMATS = ("jsonl", "csv", "parquet")
BATCH_SIZE = 32
NUM_BATCHES = 100
CHUNK = 10_000  # rows written at a time
CSV = RESULTS / "data.csv"
MIB = 2**20


def main() -> None:
    args = parse_arguments()
    if args.worker is not None:
        print(json.dumps(measure(args.worker)))
        return
    for row in record(args.csv, cases(args)):
        print(
            f"{row['format']:8} {row['rows']:>9} rows {row['file_mib']:>6} MiB: "
            f"load {row['load_s']:>6} s ({row['load_cpu_s']:>5} CPU), "
            f"first batch {row['first_batch_s']:>6} s, next {row['batch_ms']:>6} ms, "
            f"peak {row['peak_mib']:>6} MiB, kept {row['kept_bytes_per_row']:>6} bytes per row, "
            f"start {row['start_s']:>6} s ({row['start_cpu_s']:>5} CPU)",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--repeats", type=int, default=3, help="processes; their median counts")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a data set
    return parser.parse_args()


def cases(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row per format and size."""
    for num_rows in args.rows:
        for kind in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"train.{kind}"
                write(path, num_rows)
                found = [run_worker(path) for _ in range(args.repeats)]
                middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
                yield {
                    "format": kind,
                    "rows": num_rows,
                    "file_mib": f"{path.stat().st_size / MIB:.1f}",
                    "load_s": f"{middle['load_s']:.2f}",
                    "load_cpu_s": f"{middle['load_cpu_s']:.2f}",
                    "first_batch_s": f"{middle['first_batch_s']:.3f}",
                    "batch_ms": f"{middle['batch_s'] * 1000:.2f}",
                    "peak_mib": f"{middle['peak'] / MIB:.1f}",
                    "kept_bytes_per_row": f"{middle['kept'] / num_rows:.1f}",
                    "start_s": f"{middle['start_s']:.2f}",
                    "start_cpu_s": f"{middle['start_cpu_s']:.2f}",
                }


def run_worker(path: Path) -> dict[str, float]:
    """What a fresh process measures."""
    command = [sys.executable, __file__, "--worker", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: Path) -> dict[str, float]:
    """Load a data set and draw batches; times in seconds, memory in bytes."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  its code is no memory of the data set
    load_problems("quickstart:dev")  # for one-time loading
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start, cpu = time.perf_counter(), time.process_time()
    problems = load_problems(str(path))
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    stream = ProblemStream(problems, batch_size=BATCH_SIZE, seed=0, shuffle=True)
    stream.batch(1)
    first = time.perf_counter()
    seconds = []
    for step in range(2, 2 + NUM_BATCHES):
        begin = time.perf_counter()
        stream.batch(step)
        seconds.append(time.perf_counter() - begin)
    memory = {"peak": resident("VmHWM") - before, "kept": resident("VmRSS") - before}
    start_all, start_cpu = time.perf_counter(), time.process_time()
    load_datasets(DataConfig(train=str(path)))
    return {
        "start_s": time.perf_counter() - start_all,
        "start_cpu_s": time.process_time() - start_cpu,
        "load_s": loaded - start,
        "load_cpu_s": loaded_cpu - cpu,
        "first_batch_s": first - loaded,
        "batch_s": statistics.median(seconds),
        **memory,
    }


def write(path: Path, num_rows: int) -> None:
    """Write a data set in the format that the suffix says."""
    match path.suffix:
        case ".jsonl":
            with path.open("w") as file:
                for row in make_rows(num_rows):
                    file.write(json.dumps(row) + "\n")
        case ".csv":
            with path.open("w", newline="") as file:
                rows = make_rows(num_rows)
                first = next(rows)
                writer = csv.DictWriter(file, fieldnames=list(first))
                writer.writeheader()
                writer.writerow(first)
                writer.writerows(rows)
        case _:
            write_parquet(path, num_rows)


def write_parquet(path: Path, num_rows: int) -> None:
    """Write row groups as pyarrow does by default, 1,048,576 rows each at most."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = list(make_rows(num_rows))
    parquet.write_table(pa.Table.from_pylist(rows), path)


def make_rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """Word problems with their solutions; the same ones in every format."""
    rng, kinds = random.Random(0), list(KINDS)
    plans = [KINDS[kinds[number % len(kinds)]](rng) for number in range(min(num_rows, CHUNK))]
    texts = [(plan.text, plan.solution, str(plan.answer), plan.kind) for plan in plans]
    for number in range(num_rows):
        text, solution, answer, kind = texts[number % len(texts)]
        yield {
            "prompt": f"Problem {number}. {text}",
            "answer": answer,
            "reference": solution,
            "domain": kind,
            "verifier": "number",
        }


if __name__ == "__main__":
    main()
