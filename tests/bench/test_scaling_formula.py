"""The table of seconds per step in docs/scaling.md is the one that the formulas give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_document_has_the_numbers_of_the_formulas() -> None:
    command = [sys.executable, ROOT / "bench" / "scaling_formula.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = (ROOT / "docs" / "scaling.md").read_text()
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        assert row in text, row
    (memory,) = [line for line in done.stdout.splitlines() if line.startswith("rank 0, weights")]
    assert memory.split(": ")[1] in text
