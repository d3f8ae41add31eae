"""Training curves with and without a sparse gradient: does `loss.sparsity = "entry"` cost accuracy?

    python bench/sparsity_curves.py              # 12 runs of the quickstart, 20 minutes
    python bench/sparsity_curves.py --smollm2    # few steps of SmolLM2-135M (V = 49152), 15 minutes

Runs of one seed start from the same weights and see the same problems; they differ by what the rule
drops and, from then on, by what they sample. The spread between seeds is what a difference between
rules has to exceed. 2^-12 is the resolution of a bfloat16 gradient; 2^-6 is coarse.

Writes a row per rule, seed and step to bench/results/sparsity_curves.csv (sparsity_smollm2.csv with
--smollm2), and draws docs/sparsity_curves.png from the quickstart's. A run folder that exists is
read, not trained again. Further options are those of `rosd-fast train`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rosd_fast.report.metrics import read_metrics

RULES = {
    "exact": [],
    "entry 2^-16": ["--loss.sparsity", "entry", "--loss.sparsity-bound", str(2.0**-16)],
    "entry 2^-12": ["--loss.sparsity", "entry", "--loss.sparsity-bound", str(2.0**-12)],
    "entry 2^-6": ["--loss.sparsity", "entry", "--loss.sparsity-bound", str(2.0**-6)],
}
COLORS = dict(zip(RULES, ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), strict=True))
COLUMNS = {
    "divergence": "loss/divergence",
    "grad_norm": "loss/grad_norm",
    "active_frac": "loss/active_frac",
    "dropped_mass_max": "loss/dropped_mass_max",
    "grad_error_bound": "loss/grad_error_bound",
    "dev_accuracy": "eval/dev/accuracy",
    "ood_accuracy": "eval/ood/accuracy",
}
SMOLLM2 = [
    *("--preset", "quickstart", "--model", "smollm2", "--steps", "6", "--eval.every", "0"),
    *("--eval.problems", "1", "--eval.samples", "1", "--sample.max-new-tokens", "64"),
    *("--sample.problems-per-step", "4", "--sample.group-size", "4"),
    *("--optim.lr", "1e-5", "--optim.warmup-steps", "0"),
]
QUICKSTART = ["--preset", "quickstart"]


def train(rule: str, seed: int, out: Path, options: list[str]) -> Path:
    """Train in a subprocess, unless the run folder exists already; returns the folder."""
    folder = out / f"{rule.replace(' ', '_').replace('^', '')}_seed{seed}"
    if not folder.exists():
        command = [sys.executable, "-m", "rosd_fast", "train", *options, *RULES[rule]]
        command += ["--seed", str(seed), "--out", str(out), "--name", folder.name]
        subprocess.run(command, check=True)
    return folder


def curves(seeds: Sequence[int], out: Path, options: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row per rule, seed and step; the rules alternate."""
    for seed in seeds:
        for rule in RULES:
            for row in read_metrics(train(rule, seed, out, options) / "metrics.jsonl"):
                found = {name: row.get(key) for name, key in COLUMNS.items()}
                shown = {k: "" if v is None else f"{v:.6g}" for k, v in found.items()}
                yield {"rule": rule, "seed": seed, "step": int(row["step"]), **shown}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table: means over the seeds, and the range over the seeds of the accuracies."""
    lines = [
        "| rule | divergence, all steps | active fraction | largest dropped mass | dev | ood |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for rule in RULES:
        mine = [row for row in rows if row["rule"] == rule]

        def values(name: str, mine: list[dict[str, Any]] = mine) -> list[float]:
            return [float(row[name]) for row in mine if row[name] != ""]

        cells = [f"{statistics.mean(values('divergence')):.5f}"]
        active = values("active_frac")
        cells.append(f"{statistics.mean(active):.3f}" if active else "1")
        cells.append(f"{max(values('dropped_mass_max'), default=0.0):.4f}")
        last = max(row["step"] for row in mine)
        for split in ("dev", "ood"):
            at_end = [row[f"{split}_accuracy"] for row in mine if row["step"] == last]
            percent = [100 * float(value) for value in at_end if value != ""]
            cells.append(
                f"{statistics.mean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})"
                if percent
                else ""
            )
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the divergence by step: a line per seed, a color per rule."""
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for rule, color in COLORS.items():
        seeds = sorted({row["seed"] for row in rows if row["rule"] == rule})
        for seed in seeds:
            mine = [
                (row["step"], float(row["divergence"]))
                for row in rows
                if row["rule"] == rule and row["seed"] == seed and row["divergence"] != ""
            ]
            label = rule if seed == seeds[0] else None
            axes.plot(*zip(*mine, strict=True), color=color, lw=1.2, alpha=0.8, label=label)
    axes.set_title("divergence per distilled token, nats", loc="left", fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-sparsity")
    args, options = parser.parse_known_args()
    if args.smollm2:
        seeds, base, csv = args.seeds[:1], SMOLLM2, RESULTS / "sparsity_smollm2.csv"
        out = args.out / "smollm2"
    else:
        seeds, base, csv = args.seeds, QUICKSTART, RESULTS / "sparsity_curves.csv"
        out = args.out
    rows = [*record(csv, curves(seeds, out, [*base, *options]))]
    print(summary(rows))
    if not args.smollm2:
        draw(rows, ROOT / "docs" / "sparsity_curves.png")


if __name__ == "__main__":
    main()
