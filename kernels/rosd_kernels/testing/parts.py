"""The checks of `rosd-fast doctor --gpu`, one at a time and by name.

For runs that spread them over processes, where a check that crashes must not end the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from rosd_kernels.records import DIVERGENCES
from rosd_kernels.sparsity import Sparsity, entry, mass
from rosd_kernels.testing import acceptance, logprob_acceptance
from rosd_kernels.testing.checking import SHAPES, SMALL, Check, Shape, full_float32

Part = Callable[[torch.device], Check]
RULES: tuple[tuple[str, Sparsity], ...] = (("entry", entry(1e-3)), ("mass", mass(1e-3)))


def parts(shapes: tuple[Shape, ...] = SHAPES, small: tuple[Shape, ...] = SMALL) -> dict[str, Part]:
    """All checks of `acceptance.checks` and of `logprob_acceptance.checks`, in their order."""
    found: dict[str, Part] = {}
    for case in acceptance.cases(shapes, small):
        found[case.name] = partial(acceptance.check, case)
    for strategy, divergence in itertools.product(acceptance.FAST, DIVERGENCES):
        for name, rule in RULES:
            found[f"sparsity {strategy} {name}({rule.bound}) {divergence}"] = partial(
                _sparsity, strategy, divergence, name, rule, shapes[-1]
            )
    for case in logprob_acceptance.cases(shapes, small):
        found[case.name] = partial(logprob_acceptance.check, case)
    for strategy in logprob_acceptance.FAST:
        for name, rule in RULES:
            found[f"logprob sparsity {strategy} {name}({rule.bound})"] = partial(
                _logprob_sparsity, strategy, name, rule, shapes[-1]
            )
    return {name: partial(_in_float32, part) for name, part in found.items()}


def _in_float32(part: Part, device: torch.device) -> Check:
    with full_float32():
        return part(device)


def _sparsity(
    strategy: str, divergence: str, name: str, rule: Sparsity, shape: Shape, device: torch.device
) -> Check:
    return acceptance.check_sparsity(device, strategy, divergence, name, rule, shape)


def _logprob_sparsity(
    strategy: str, name: str, rule: Sparsity, shape: Shape, device: torch.device
) -> Check:
    return logprob_acceptance.check_sparsity(device, strategy, name, rule, shape)
