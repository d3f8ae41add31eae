"""Lower bounds for the divergence on GPUs: FLOPs and bytes against the data sheets.

    python bench/roofline.py               # rewrites bench/results/roofline.csv
    python bench/roofline.py --markdown    # and prints the two tables of docs/kernels.md

Nothing here is measured. Each pass takes the larger of FLOPs / peak and bytes / bandwidth, and the
passes run one after the other: no program can be faster, and real ones are slower (a good GEMM
reaches 60 to 80 percent of the peak). The bytes are those that this project's own blocks and chunks
move to and from HBM, where neighbouring blocks find shared data in the L2 cache.

JSD with gradients to hidden states and head, bfloat16, student and teacher sharing one head.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from harness import RESULTS

from rosd_kernels.tiles import TILE

CSV = RESULTS / "roofline.csv"
MIB, GIB = 2**20, 2**30
NARROW, WIDE = 2, 4  # bytes of bfloat16 and float32
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)
WORKSPACES_MIB = (256, 2048)
F = 0.15  # active fraction of peaked distributions with an ordered vocabulary; see docs/kernels.md
GROUP_ROWS = 8 * 128  # rows that share a block of the head in L2 (configs.py)
# Buffers of [N, V] float32 at the peak of the eager JSD, as bench/loss.py measures on a CPU.
EAGER_BUFFERS = 12


class Gpu(NamedTuple):
    """From NVIDIA's data sheets, SXM modules."""

    name: str
    flops: float  # dense bfloat16 with float32 sums, per second
    bandwidth: float  # of HBM, bytes per second


GPUS = (Gpu("H100", 989e12, 3.35e12), Gpu("H200", 989e12, 4.8e12), Gpu("B200", 2250e12, 8e12))


class Head(NamedTuple):
    """A model's head: V and H from its config.json."""

    name: str
    V: int
    H: int


HEADS = (
    Head("Qwen3-4B", 151936, 2560),
    Head("Qwen3-8B", 151936, 4096),
    Head("Qwen3-32B", 151936, 5120),
)


class Pass(NamedTuple):
    """A kernel, or a GEMM of the library."""

    flops: float
    num_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A row of the CSV."""

    gpu: str
    head: str
    tokens: int
    candidate: str
    units: float  # sweeps of the head's GEMM over all tokens
    traffic_gib: float
    compute_ms: float  # all FLOPs at the peak
    roof_ms: float
    memory_gib: float  # beyond inputs and gradients


def eager(N: int, head: Head) -> tuple[list[Pass], float]:
    """Four GEMMs; each buffer is written and read once, at least."""
    unit, weights, logits = 2.0 * N * head.V * head.H, head.V * head.H * NARROW, N * head.V
    gemm = Pass(unit, weights + logits * NARROW)
    elementwise = Pass(0, 2 * EAGER_BUFFERS * logits * WIDE)
    return [gemm] * 4 + [elementwise], EAGER_BUFFERS * logits * WIDE


def chunked(N: int, head: Head, workspace_mib: int) -> tuple[list[Pass], float]:
    """Rows in chunks; dW, in float32, is read and written once per chunk."""
    V, H = head.V, head.H
    num_chunks = -(-N // max(1, int(workspace_mib * MIB) // (2 * V * WIDE)))
    rows, weights = N / num_chunks, V * H * NARROW
    logits = rows * V * WIDE
    project = Pass(4 * rows * V * H, weights + 2 * logits)
    # The rows kernel: both logits in three passes, G out once; then G to bfloat16.
    elementwise = Pass(0, 3 * 2 * logits + logits + 1.5 * logits)
    backproject = Pass(2 * rows * V * H, weights + logits / 2)
    add_head = Pass(2 * rows * V * H, logits / 2 + 2 * V * H * WIDE)
    round_head = Pass(0, V * H * (WIDE + NARROW))
    chunk = [project, elementwise, backproject, add_head]
    return chunk * num_chunks + [round_head], 2 * logits + V * H * WIDE


def tiled(N: int, head: Head, f: float, workspace_mib: int = 256) -> tuple[list[Pass], float]:
    """The vocabulary in chunks; dh, in float32, is read and written once per chunk."""
    V, H = head.V, head.H
    T = -(-V // TILE)
    unit, weights, states = 2.0 * N * V * H, V * H * NARROW, N * H * NARROW
    groups = -(-N // GROUP_ROWS)
    statistics = 4 * 2 * N * T * WIDE
    sweep = Pass(2 * unit, 2 * groups * weights + statistics)
    select = Pass(0, statistics)
    loss = Pass(2 * f * unit, f * groups * weights + 2 * states + 2 * N * T * WIDE)
    tiles = min(max(1, int(workspace_mib * MIB) // (N * TILE * NARROW)), T)
    num_chunks = -(-T // tiles)
    grad = f * N * V * NARROW
    grad_logits = Pass(2 * f * unit, f * groups * weights + num_chunks * 2 * states + grad)
    grad_hidden = Pass(f * unit, grad + f * weights + num_chunks * 2 * N * H * WIDE)
    grad_head = Pass(f * unit, grad + num_chunks * states + weights)
    memory = statistics + N * tiles * TILE * NARROW + N * H * WIDE
    return [sweep, select, loss, grad_logits, grad_hidden, grad_head], memory


def forecasts() -> Iterator[Forecast]:
    for gpu in GPUS:
        for head in HEADS:
            for N in TOKENS:
                candidates = {"eager": eager(N, head)}
                for mib in WORKSPACES_MIB:
                    candidates[f"chunked {mib} MiB"] = chunked(N, head, mib)
                candidates["tiled exact"] = tiled(N, head, 1.0)
                candidates[f"tiled f={F}"] = tiled(N, head, F)
                for name, (passes, memory) in candidates.items():
                    flops = sum(p.flops for p in passes)
                    roof = sum(
                        max(p.flops / gpu.flops, p.num_bytes / gpu.bandwidth) for p in passes
                    )
                    yield Forecast(
                        gpu=gpu.name,
                        head=head.name,
                        tokens=N,
                        candidate=name,
                        units=round(flops / (2.0 * N * head.V * head.H), 2),
                        traffic_gib=round(sum(p.num_bytes for p in passes) / GIB, 1),
                        compute_ms=round(1e3 * flops / gpu.flops, 2),
                        roof_ms=round(1e3 * roof, 2),
                        memory_gib=round(memory / GIB, 2),
                    )


def write_csv(path: Path, rows: Iterable[Forecast]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Forecast)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table(rows: Iterable[Forecast], labels: tuple[str, ...]) -> str:
    """A Markdown table: one line per value of `labels`, one column per candidate."""
    lines: dict[tuple[object, ...], list[str]] = {}
    names: list[str] = []
    for row in rows:
        key = tuple(getattr(row, label) for label in labels)
        lines.setdefault(key, []).append(f"{row.roof_ms:.1f} ms, {row.memory_gib:.1f} GiB")
        if row.candidate not in names:
            names.append(row.candidate)
    text = [
        f"| {' | '.join([*labels, *names])} |",
        f"|{'---|' * len(labels)}{'---:|' * len(names)}",
    ]
    text += [f"| {' | '.join([*map(str, key), *cells])} |" for key, cells in lines.items()]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, default=CSV, help="file to write")
    parser.add_argument("--markdown", action="store_true", help="print the tables for the docs")
    args = parser.parse_args()
    rows = list(forecasts())
    write_csv(args.csv, rows)
    if args.markdown:
        print(table((row for row in rows if row.tokens == 8192), ("gpu", "head")), end="\n\n")
        chosen = (row for row in rows if row.gpu == "H100" and row.head == "Qwen3-8B")
        print(table(chosen, ("tokens",)))


if __name__ == "__main__":
    main()
