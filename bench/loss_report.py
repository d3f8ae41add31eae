"""The table in README.md and the picture docs/loss_cpu.png, from what bench/loss.py measured.

    python bench/loss_report.py        # from bench/results/loss_cpu.csv; measures nothing

bench/loss.py does the same after a whole run.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, write_between

CSV = RESULTS / "loss_cpu.csv"
PICTURE = ROOT / "docs" / "loss_cpu.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- loss table -->", "<!-- end of loss table -->"
TOKENS = 512  # of the table's rows
SHOWN = (  # states, candidate and label; the label's fields are columns of the row
    ("smollm2", "chunked", "`chunked`, the default"),
    ("smollm2", "chunked entry", "`chunked`, entry 2^-12 (f = {active_frac:.2f})"),
    (
        "sharp",
        "chunked entry",
        "the same, states of {student_entropy:.1f} nats (f = {active_frac:.3f})",
    ),
    ("smollm2", "tiled exact", "`tiled`"),
    ("smollm2", "eager", "eager PyTorch"),
    ("smollm2", "liger", "Liger {liger_kernel}"),
    ("smollm2", "trl", "TRL {trl}, chunks of 256 tokens"),
)
NUMBERS = ("active_frac", "student_entropy")  # columns that labels round
COLOURS = {
    "chunked": "#0072B2",
    "chunked entry": "#000000",
    "tiled exact": "#56B4E9",
    "tiled entry": "#009E73",
    "tiled entry, ordered": "#F0E442",
    "eager": "#D55E00",
    "liger": "#CC79A7",
    "trl": "#882255",
    "floor": "#999999",
}

Row = Mapping[str, Any]  # of the CSV


def main() -> None:
    with CSV.open(newline="") as file:
        report(list(csv.DictReader(file)), PICTURE, README)


def report(rows: Sequence[Row], picture: Path, readme: Path) -> None:
    """Draw the picture and replace the table between its markers."""
    draw(rows, picture)
    write_between(readme, BEGIN, END, table(rows))


def table(rows: Sequence[Row]) -> str:
    """A sentence on what was measured, and the Markdown table: units, time, memory per candidate.

    Raises ValueError where a row that the table shows was not measured.
    """
    found = {
        (row["states"], row["candidate"]): row
        for row in rows
        if row["setting"] == "jsd" and int(row["tokens"]) == TOKENS
    }
    missing = [f"{states}: {name}" for states, name, _ in SHOWN if (states, name) not in found]
    if missing:
        raise ValueError(f"no row of {TOKENS} tokens for {'; '.join(missing)}; run bench/loss.py")
    first = found[SHOWN[0][:2]]
    lines = [
        f"JSD of {TOKENS} tokens, forward and backward, V = {first['vocab']}, H = "
        f"{first['hidden']}, float32, threads: {first['threads']}, SmolLM2's states "
        f"({float(first['student_entropy']):.1f} nats); commit {first['commit']}:",
        "",
        "| | units | time / four GEMMs | peak memory |",
        "|---|---:|---:|---:|",
    ]
    for states, name, label in SHOWN:
        row = found[states, name]
        numbers = {key: float(row[key] or 1) for key in NUMBERS}
        lines.append(
            f"| {label.format(**{**row, **numbers})} | {float(row['units']):.1f} "
            f"| {float(row['vs_floor']):.2f} | {float(row['peak_mib']):.0f} MiB |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw time relative to eager, and peak memory, per shape."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["setting"] == "jsd"]
    sources = list(dict.fromkeys(row["states"] for row in rows))
    figure = Figure(figsize=(12, 3.6 * len(sources)), layout="constrained")
    axes = figure.subplots(len(sources), 2, squeeze=False)
    for (left, right), source in zip(axes, sources, strict=True):
        chosen = [row for row in rows if row["states"] == source]
        tokens = sorted({int(row["tokens"]) for row in chosen})
        width = 0.8 / len(COLOURS)
        for place, (name, colour) in enumerate(COLOURS.items()):
            mine = [row for row in chosen if row["candidate"] == name]
            mine.sort(key=lambda row: int(row["tokens"]))
            x = [i + (place - 4) * width for i in range(len(tokens))]
            left.bar(x, [float(row["vs_eager"]) for row in mine], width, color=colour, label=name)
            if name != "floor":
                right.bar(x, [float(row["peak_mib"]) for row in mine], width, color=colour)
        for axis in (left, right):
            axis.set_xticks(range(len(tokens)), [f"{n} tokens" for n in tokens])
            axis.spines[["top", "right"]].set_visible(False)
        vocab, hidden = chosen[0]["vocab"], chosen[0]["hidden"]
        left.set_title(f"time / time of eager   ({source}: V = {vocab}, H = {hidden})", loc="left")
        right.set_title("peak memory beyond inputs and gradients, MiB", loc="left")
        right.set_yscale("log")
        left.set_ylim(top=1.35 * left.get_ylim()[1])  # room for the legend
        left.legend(frameon=False, fontsize=8, ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
