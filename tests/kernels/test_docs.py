"""The snippets of docs/kernels.md: they run, and both ways give the same loss and gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def snippets() -> list[str]:
    """The Python blocks of the page: inputs, then eager and ours of each function."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def run(snippet: str, names: dict[str, Any]) -> dict[str, Tensor]:
    """Run a snippet on the inputs in `names`: its loss and the gradients that it leaves."""
    for name in ("student", "head"):
        names[name].grad = None
    exec(compile(snippet, str(PAGE), "exec"), names)
    found = {name: names[name].grad for name in ("student", "head")}
    return {"loss": names.pop("loss").detach(), **found}


def test_eager_and_ours_agree():
    inputs, *pairs = snippets()
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(inputs, str(PAGE), "exec"), names)
    assert len(pairs) == 4  # of span_divergence and of span_logprob
    for eager, ours in zip(pairs[::2], pairs[1::2], strict=True):
        want = run(eager, names)
        got = run(ours, names)
        assert want["loss"].abs().item() > 0.1
        for name, tensor in want.items():
            error = (got[name] - tensor).abs().max().item()
            assert error <= 1e-5 * tensor.abs().max().item(), name
