"""`rosd-fast train`: run the loop, or go on with a run."""

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

    Later wins: defaults, --preset, --config, options here. Without a model: the preset quickstart.
    """

    preset: str | None = None
    """A named set of options that comes with the package: quickstart, smollm2."""
    config: str | None = None
    """A TOML file of options, such as the config.toml of a run."""
    resume: str | None = None
    """A run folder: go on from its last checkpoint. Besides, only --steps may be given."""


def defaults(given: Mapping[str, Any]) -> Options:
    """What the help shows: the defaults under the preset and file that are given."""
    return Options.model_validate(read_config(given).model_dump() | _sources(given))


def read_config(given: Mapping[str, Any]) -> Config:
    """The run's options. Raises UserError for what is wrong with them."""
    options = {name: value for name, value in given.items() if name not in SOURCES}
    sources = _sources(given)
    if sources["resume"] is None:
        return load_config(options, preset=sources["preset"], file=sources["config"])
    fixed = [name for name in given if name not in ("resume", *FREE_ON_RESUME)]
    if fixed:
        raise UserError(
            f"{as_flag(fixed[0])} cannot be changed where a run is resumed",
            fix="Leave it out (only --steps may be given), or start a new run",
        )
    file = resumed_file(sources["resume"])
    return apply_args(apply_toml(Config(), file, accept_old_names=True), options)


def resumed_file(resume: str) -> Path:
    """The config.toml of the run folder."""
    folder = Path(resume).expanduser()
    if not folder.is_dir():
        raise UserError("there is no such run folder", where=resume)
    file = folder / "config.toml"
    if not file.is_file():
        raise UserError(
            "the folder holds no config.toml, so it is no run", where=resume, fix="Give runs/NAME"
        )
    return file


def run(given: Mapping[str, Any]) -> int:
    """Train. The run folder's path is printed by the run itself."""
    config = read_config(given)
    resume = _sources(given)["resume"]

    from rosd_fast.train import train

    train(config, resume=None if resume is None else Path(resume).expanduser())
    return 0


def _sources(given: Mapping[str, Any]) -> dict[str, str | None]:
    return {name: given.get(name) for name in SOURCES}
