"""Options that say the same thing in two ways. The last layer that gives one of them decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PAIRS = (("epochs", "steps"), ("optim.warmup_frac", "optim.warmup_steps"))
NEVER_NONE = ("steps",)


def both_given(layer: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first pair of which a layer gives both options; None: there is none."""
    return next((pair for pair in PAIRS if all(_given(layer, name) for name in pair)), None)


def with_alternatives(layer: dict[str, Any]) -> dict[str, Any]:
    """`layer`, in which an option that it gives sets the other one of its pair to none."""
    for given, other in _ordered_pairs():
        if _given(layer, given) and other not in NEVER_NONE:
            section, _, key = other.rpartition(".")
            layer = (
                {**layer, section: {**layer[section], key: None}}
                if section
                else {**layer, key: None}
            )
    return layer


def _ordered_pairs() -> Iterator[tuple[str, str]]:
    for first, second in PAIRS:
        yield first, second
        yield second, first


def _given(layer: Mapping[str, Any], name: str) -> bool:
    """Whether a layer sets the option, to something other than none."""
    section, _, key = name.rpartition(".")
    table = layer.get(section) if section else layer
    return isinstance(table, Mapping) and table.get(key) is not None
