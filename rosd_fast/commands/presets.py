"""`rosd-fast presets`: what each preset is for, and the values in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rosd_fast.config import Section
from rosd_fast.config.load import apply_args, preset_names, preset_path

POSITIONAL = ("name",)


class Options(Section):
    """List the presets, or print one of them with the source of each value."""

    name: str | None = None
    """The preset to print; None: list all. `--name` may be left out."""


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Print the presets."""
    options = apply_args(Options(), given)
    if options.name is not None:
        print(preset_path(options.name).read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, preset_names()))
    for name in preset_names():
        print(f"{name:<{width}}  {summary(name)}")
    return 0


def summary(name: str) -> str:
    """The first line of a preset's file, which says what it is for."""
    first = preset_path(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ")
