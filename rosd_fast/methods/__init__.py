"""Training methods: what a rollout is trained on. `base` says what one is, `rosd` is the first."""

from __future__ import annotations

from rosd_fast.config.arguments import nearest
from rosd_fast.errors import UserError
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.rosd import Rosd

__all__ = ["METHODS", "Method", "Rosd", "TrainingSet", "method_class"]

METHODS: dict[str, type[Method]] = {"rosd": Rosd}
"""Methods by the name that the option `method` gives; a script may add its own."""


def method_class(name: str) -> type[Method]:
    """The method that the option `method` names. Raises UserError when there is none."""
    if name not in METHODS:
        near = nearest(name, METHODS)
        known = f"Known are {', '.join(sorted(METHODS))}"
        raise UserError(
            f"there is no method {name!r}",
            where="method",
            fix=f"Did you mean {near}? {known}" if near else known,
        )
    return METHODS[name]
