"""Training methods: what a rollout is trained on. `base` says what one is, each has a file.

`register_method` adds one, here or in a script of your own before it calls `train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rosd_fast.config.suggest import nearest
from rosd_fast.errors import UserError
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.grpo import Grpo
from rosd_fast.methods.opd import Opd
from rosd_fast.methods.opsd import Opsd
from rosd_fast.methods.rosd import Rosd
from rosd_fast.methods.sdpo import Sdpo
from rosd_fast.methods.sft import Sft

__all__ = ["METHODS", "Method", "TrainingSet", "find_method", "register_method"]

_REGISTERED: dict[str, type[Method]] = {}
METHODS: Mapping[str, type[Method]] = MappingProxyType(_REGISTERED)
"""The methods by name; `register_method` adds to them."""


def register_method(name: str, method: type[Method]) -> None:
    """Make `method` the one that the option method=`name` selects.

    Raises ValueError when the name is taken.
    """
    if name in _REGISTERED:
        raise ValueError(f"there is a method {name!r} already")
    _REGISTERED[name] = method


def find_method(name: str) -> type[Method]:
    """Return the method of this name. Raises UserError when there is none."""
    if name not in METHODS:
        near = nearest(name, METHODS)
        known = f"Known are {', '.join(sorted(METHODS))}"
        raise UserError(
            f"there is no method {name!r}",
            where="method",
            fix=f"Did you mean {near}? {known}" if near else known,
        )
    return METHODS[name]


register_method("rosd", Rosd)
register_method("sdpo", Sdpo)
register_method("opsd", Opsd)
register_method("opd", Opd)
register_method("grpo", Grpo)
register_method("sft", Sft)
