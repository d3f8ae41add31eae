"""Train every method for 30 steps of the quickstart: accuracy, and the tokens that it cost.

    python bench/quickstart_methods.py             # about 15 minutes on two cores

Writes bench/results/quickstart_methods.csv and the table in docs/methods.md. A run folder that
exists is read, not trained again. `opd` learns from the checkpoint of `rosd`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, record

from rosd_fast.report.metrics import read_metrics

METHODS = ("rosd", "sdpo", "opsd", "opd", "grpo", "sft")
WHEN = ("before", "after")
BEGIN, END = "<!-- methods table -->", "<!-- end of methods table -->"
HEADER = (
    "| `method` | in domain: before | after | out of domain: before | after "
    "| rollout tokens | reflection tokens | learner tokens |"
)


def train(method: str, out: Path, options: list[str]) -> Path:
    """Train in a subprocess, unless the run folder exists already; returns the folder."""
    folder = out / method
    if not folder.exists():
        command = [sys.executable, "-m", "rosd_fast", "train", "--preset", "quickstart"]
        command += ["--method", method, "--out", str(out), "--name", method]
        command += ["--eval.every", "0", *options]
        if method == "opd":
            teacher = max((out / "rosd" / "checkpoints").glob("step_*"))
            command += ["--teacher.model", str(teacher)]
        subprocess.run(command, check=True)
    return folder


def measure(method: str, folder: Path) -> dict[str, Any]:
    """Accuracies in percent before and after, and the tokens of all steps."""
    rows = read_metrics(folder / "metrics.jsonl")
    first, last, steps = rows[0], rows[-1], rows[1:]

    def total(count: str, mean: str) -> int:
        return round(sum(row.get(count, 0.0) * row.get(mean, 0.0) for row in steps))

    return {
        "method": method,
        "steps": len(steps),
        **{
            f"{split}_{when}": round(100 * row[f"eval/{split}/accuracy"], 1)
            for split in ("dev", "ood")
            for when, row in (("before", first), ("after", last))
        },
        "rollout_tokens": total("rollout/num_rollouts", "rollout/tokens_mean"),
        "reflection_tokens": total("reflect/num_reflections", "reflect/tokens_mean"),
        "learner_tokens": round(sum(row.get("loss/num_input_tokens", 0.0) for row in steps)),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table: a row per method."""
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for result in results:
        accuracies = [f"{result[f'{s}_{w}']:.1f}" for s in ("dev", "ood") for w in WHEN]
        tokens = [f"{result[f'{name}_tokens']:,}" for name in ("rollout", "reflection", "learner")]
        lines.append(f"| `{result['method']}` | {' | '.join([*accuracies, *tokens])} |")
    return "\n".join(lines)


def write_table(text: str) -> None:
    """Replace the table between its markers in docs/methods.md."""
    path = ROOT / "docs" / "methods.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-methods")
    args, options = parser.parse_known_args()
    rows = (measure(name, train(name, args.out, options)) for name in METHODS)
    text = table(list(record(RESULTS / "quickstart_methods.csv", rows)))
    print(text)
    write_table(text)


if __name__ == "__main__":
    main()
