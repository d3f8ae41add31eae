"""Train the quickstart with three seeds and record its accuracy before and after.

    python bench/quickstart.py             # about five minutes on two cores

Writes bench/results/quickstart.csv, the table in README.md and docs/learning_curve.png. The figures
are mean@4 accuracy at temperature 1 on the dev splits. Neither training nor tuning uses the test
splits.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from harness import environment, write_between
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rosd_fast.report.metrics import read_metrics

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- quickstart table -->", "<!-- end of quickstart table -->"
SPLITS = {"dev": "in domain", "ood": "out of domain"}


@dataclass(frozen=True, slots=True)
class Trial:
    """One seed's run: accuracy in percent by split and step."""

    seed: int
    curves: dict[str, list[tuple[int, float]]]

    def before(self, split: str) -> float:
        return self.curves[split][0][1]

    def after(self, split: str) -> float:
        return self.curves[split][-1][1]


def run_trial(seed: int, out: Path, options: list[str]) -> Trial:
    """Train in a subprocess, unless the run folder exists already."""
    folder = out / f"seed{seed}"
    if not folder.exists():
        command = [sys.executable, "-m", "rosd_fast", "train", "--preset", "quickstart"]
        command += ["--seed", str(seed), "--out", str(out), "--name", folder.name, *options]
        subprocess.run(command, check=True)
    return read_trial(seed, folder)


def read_trial(seed: int, folder: Path) -> Trial:
    rows = read_metrics(folder / "metrics.jsonl")
    curves = {
        split: [
            (int(row["step"]), 100 * row[f"eval/{split}/accuracy"])
            for row in rows
            if f"eval/{split}/accuracy" in row
        ]
        for split in SPLITS
    }
    return Trial(seed, curves)


def table(trials: list[Trial]) -> str:
    """The Markdown table: a row per seed and one with the means."""
    lines = [
        "| seed | in domain: before | after | change | out of domain: before | after | change |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in [*((str(t.seed), [t]) for t in trials), ("mean", trials)]:
        cells = [name]
        for split in SPLITS:
            before = statistics.mean(t.before(split) for t in group)
            after = statistics.mean(t.after(split) for t in group)
            cells += [f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(trials: list[Trial]) -> None:
    row = environment()
    with (ROOT / "bench" / "results" / "quickstart.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "split", "step", "accuracy", *row])
        for trial in trials:
            for split, curve in trial.curves.items():
                for step, accuracy in curve:
                    writer.writerow(
                        [
                            trial.seed,
                            split,
                            step,
                            f"{accuracy:.2f}",
                            *row.values(),
                        ]
                    )


def draw(trials: list[Trial]) -> None:
    """Draw the learning curve: the mean over seeds as a line, each seed as a faint one."""
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for color, (split, name) in zip(("#0072B2", "#D55E00"), SPLITS.items(), strict=True):
        steps = [step for step, _ in trials[0].curves[split]]
        for trial in trials:
            axes.plot(steps, [a for _, a in trial.curves[split]], color=color, alpha=0.25, lw=1)
        mean = [statistics.mean(t.curves[split][i][1] for t in trials) for i in range(len(steps))]
        axes.plot(steps, mean, color=color, lw=2.2, marker="o", ms=4, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("accuracy on dev problems, mean@4 (%)")
    axes.set_title(f"Quickstart: {len(trials)} seeds, two CPU cores", loc="left", fontsize=11)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(ROOT / "docs" / "learning_curve.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-quickstart")
    args, options = parser.parse_known_args()
    trials = [run_trial(seed, args.out, options) for seed in args.seeds]
    text = table(trials)
    print(text)
    write_csv(trials)
    write_between(ROOT / "README.md", BEGIN, END, text)
    draw(trials)


if __name__ == "__main__":
    main()
