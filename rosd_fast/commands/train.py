"""`rosd-fast train`: start a run or resume one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rosd_fast.config import Config
from rosd_fast.config.arguments import as_flag
from rosd_fast.config.load import apply_args, apply_toml, load_config
from rosd_fast.errors import UserError

POSITIONAL: tuple[str, ...] = ()
SOURCES = ("preset", "config", "resume")
FREE_ON_RESUME = ("steps",)


class Options(Config):
    """Train with reflective on-policy self-distillation.

    Options are read from the defaults, --preset, --config and the command line; later ones win.
    Without a model, the preset quickstart is used.
    """

    preset: tuple[str, ...] = ()
    """Named sets of options, as in --preset paper --preset qwen3-4b or --preset paper,qwen3-4b; a
    later one replaces single options of those before it. rosd-fast presets lists them."""
    config: str | None = None
    """A TOML file of options, such as the config.toml of a run."""
    resume: str | None = None
    """A run folder whose run is continued from its last checkpoint. Only --steps may be given
    with it."""


def defaults(given: Mapping[str, Any]) -> Options:
    """The defaults that the help shows: those of the given preset and file."""
    return Options.model_validate(read_config(given).model_dump() | _sources(given))


def read_config(given: Mapping[str, Any]) -> Config:
    """The options of the run. Raises UserError when one of them is wrong."""
    options = {name: value for name, value in given.items() if name not in SOURCES}
    sources = _sources(given)
    if sources["resume"] is None:
        return load_config(options, presets=sources["preset"], file=sources["config"])
    fixed = [name for name in given if name not in ("resume", *FREE_ON_RESUME)]
    if fixed:
        raise UserError(
            f"{as_flag(fixed[0])} cannot be changed when a run is resumed",
            fix="Leave it out (only --steps may be given), or start a new run",
        )
    file = resumed_file(sources["resume"])
    return apply_args(apply_toml(Config(), file, accept_old_names=True), options)


def resumed_file(resume: str) -> Path:
    """The config.toml of the run folder. Raises UserError when there is none."""
    folder = Path(resume).expanduser()
    if not folder.is_dir():
        raise UserError("there is no such run folder", where=resume)
    file = folder / "config.toml"
    if not file.is_file():
        raise UserError(
            "the folder holds no config.toml, so it is not a run",
            where=resume,
            fix="Give runs/NAME",
        )
    return file


def run(given: Mapping[str, Any]) -> int:
    """Train. The run prints the path of its folder."""
    config = read_config(given)
    resume = _sources(given)["resume"]

    from rosd_fast.train import train

    train(config, resume=None if resume is None else Path(resume).expanduser())
    return 0


def _sources(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given.get(name, Options.model_fields[name].default) for name in SOURCES}
