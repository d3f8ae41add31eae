"""The parts are the checks of the acceptance run, each once."""

from __future__ import annotations

import torch

from rosd_kernels.testing import acceptance, logprob_acceptance, parts
from rosd_kernels.testing.checking import Check, Shape

SHAPES = (Shape(9, 300, 20), Shape(130, 512, 16))
SMALL = (Shape(1, 7, 3), Shape(0, 30, 8))
CPU = torch.device("cpu")


def test_parts_are_the_checks_of_both_modules_in_their_order(monkeypatch):
    """Without computing anything: every check is replaced by its name."""
    for module in (acceptance, logprob_acceptance):
        monkeypatch.setattr(module, "check", lambda case, device: Check(case.name, True, ""))
    monkeypatch.setattr(
        acceptance,
        "check_sparsity",
        lambda device, strategy, of, name, rule, shape: Check(
            f"sparsity {strategy} {name}({rule.bound}) {of}", True, ""
        ),
    )
    monkeypatch.setattr(
        logprob_acceptance,
        "check_sparsity",
        lambda device, of, name, rule, shape: Check(
            f"logprob sparsity {of} {name}({rule.bound})", True, ""
        ),
    )
    wanted = [check.name for check in acceptance.checks(CPU, SHAPES, SMALL)]
    wanted += [check.name for check in logprob_acceptance.checks(CPU, SHAPES, SMALL)]
    found = parts.parts(SHAPES, SMALL)
    assert list(found) == wanted
    assert [part(CPU).name for part in found.values()] == wanted


def test_a_part_is_a_real_check_in_full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = parts.parts(SHAPES[:1], ())
        for name in ("tiled jsd float32 9x300x20", "logprob sparsity chunked mass(0.001)"):
            check = found[name](CPU)
            assert check.name == name
            assert check.ok, check.text
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
