"""Every strategy against golden.json, which make_golden.py computes without torch."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from rosd_kernels import native, span_divergence

FOLDER = Path(__file__).parent
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
STUDENTS = ("student_hidden", "student_head", "student_bias")
CASES = {f"{case['divergence']}-top_k {case['top_k']}": case for case in GOLDEN["cases"]}
LEGAL = [
    (name, strategy)
    for name, case in CASES.items()
    for strategy in ("reference", "chunked", "tiled", "auto")
    if strategy != "tiled" or case["top_k"] is None  # tiles have no top-k
]


def numbers(value: Any) -> list[float]:
    """All floats of a nested value, first to last."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, float) else []


def run(inputs: dict[str, Any], dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in inputs.items()}
    leaves = {name: tensors[name].requires_grad_() for name in STUDENTS if name in tensors}
    out = span_divergence(**tensors, **options)
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    found = {"loss": out.loss.detach(), "per_token": out.per_token}
    return found | dict(zip(leaves, gradients, strict=True))


def check(got: dict[str, torch.Tensor], case: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        want = torch.tensor(case[name], dtype=torch.float64)
        tolerance = 1e-13 if got[name].dtype == torch.float64 else 1e-6
        error = (got[name].double() - want).abs().max().item()
        assert error <= tolerance * (1 + want.abs().max().item()), f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["native", "plain"])
@pytest.mark.parametrize(("name", "strategy"), LEGAL)
def test_strategies(monkeypatch, name, strategy, backend, dtype):
    case = CASES[name]
    if backend == "plain":
        monkeypatch.setattr(native, "is_available", lambda: False)
    options = {"divergence": case["divergence"], "top_k": case["top_k"], "strategy": strategy}
    got = run(GOLDEN["inputs"], dtype, **options)
    check(got, case, ("loss", "per_token", *STUDENTS))


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_the_logits(name):
    """With the identity as head the hidden states are the logits."""
    case, inputs = CASES[name], GOLDEN["inputs"]
    logits = {}
    for side in ("student", "teacher"):
        hidden, head, bias = (
            torch.tensor(inputs[f"{side}_{part}"], dtype=torch.float64)
            for part in ("hidden", "head", "bias")
        )
        logits[f"{side}_hidden"] = (hidden @ head.T + bias).tolist()
    identity = torch.eye(len(inputs["student_bias"])).tolist()
    got = run(
        {**logits, "student_head": identity},
        torch.float64,
        divergence=case["divergence"],
        top_k=case["top_k"],
    )
    check({"logits": got["student_hidden"]}, case, ("logits",))


def test_the_file_is_what_its_maker_makes():
    """The file is reproducible, except for the last digit of `exp` and `log`."""
    made = runpy.run_path(str(FOLDER / "make_golden.py"))["make"]()
    assert made["inputs"] == GOLDEN["inputs"]
    want, got = numbers(GOLDEN["cases"]), numbers(made["cases"])
    assert len(want) == len(got) > 200
    for a, b in zip(got, want, strict=True):
        assert math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-14)
    keys = ("alpha", "divergence", "top_k")
    assert [[c[k] for k in keys] for c in made["cases"]] == [
        [c[k] for k in keys] for c in GOLDEN["cases"]
    ]


def test_its_gradients_are_those_of_its_values():
    """Central differences of make_golden's own values confirm its gradient formulas."""
    maker = runpy.run_path(str(FOLDER / "make_golden.py"))
    inputs, step = maker["make_inputs"](), 1e-5
    for case in GOLDEN["cases"]:
        for v in range(maker["V"]):
            values = []
            for sign in (1, -1):
                bias = list(inputs["student_bias"])
                bias[v] += sign * step
                moved = inputs | {"student_bias": bias}
                values.append(maker["solve"](moved, case["divergence"], case["top_k"])["loss"])
            slope = (values[0] - values[1]) / (2 * step)
            assert slope == pytest.approx(case["student_bias"][v], rel=1e-6, abs=1e-9)
