"""The benchmark of rank 0's own work, in miniature."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from bench.harness import ROOT

STAGES = (
    "read_answers decode reflection_prompts send_requests thinking locate build_samples pack "
    "pickle metrics write_rollouts"
).split()


def test_all_stages_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    command = [sys.executable, str(ROOT / "bench" / "host.py"), "--model", "quickstart"]
    command += ["--scale", "0.01", "--tokens", "300", "--csv", str(path)]
    path_here = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path_here},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == STAGES
    assert all(float(row["cpu_s"]) >= 0 and float(row["step_cpu_s"]) >= 0 for row in rows)
    assert {(row["problems"], row["group_size"], row["tokens"]) for row in rows} == {
        ("1", "3", "300")
    }
