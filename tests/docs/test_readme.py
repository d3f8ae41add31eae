"""What the README shows works, and what writes into it finds its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_divergence_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    torch.manual_seed(0)
    student = torch.randn(5, 8, requires_grad=True)
    head = torch.nn.Linear(8, 13, bias=False)
    names: dict[str, Any] = {
        "student_hidden": student,
        "teacher_hidden": torch.randn(5, 8),
        "head": head,
    }
    exec(snippet, names)
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["quickstart table", "loss table"])
def test_tables_have_their_markers(name: str) -> None:
    """bench/quickstart.py and bench/loss_report.py put their tables between them."""
    text = README.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)
