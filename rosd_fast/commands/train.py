"""`rosd-fast train`: start a run or resume one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

from rosd_fast.commands import rank
from rosd_fast.config import Config, PositiveFloat, PositiveInt
from rosd_fast.config.arguments import as_flag, options_of
from rosd_fast.config.load import apply_args, apply_toml, load_config, load_preset
from rosd_fast.config.toml import is_dump
from rosd_fast.errors import UserError
from rosd_fast.files import RUN_CONFIG

POSITIONAL: tuple[str, ...] = ()
SOURCES = ("preset", "config", "like", "resume")
DRY_RUN = ("dry_run", "num_gpus", "gpu_memory_gib")
MAX_NAMED = 4  # options in a note
FREE_ON_RESUME = ("steps", "epochs")


class Options(Config):
    """Train with reflective on-policy self-distillation.

    Options are read from the defaults, --preset, --config and the command line; later ones win.
    Without a model, the preset quickstart is used.
    """

    preset: tuple[str, ...] = ()
    """Named sets of options, as in --preset paper --preset qwen3-4b or --preset paper,qwen3-4b; a
    later one replaces single options of those before it. rosd-fast presets lists them."""
    config: str | None = None
    """A TOML file of options, such as the config.toml of a run; a run folder is as in --like."""
    like: str | None = None
    """A run folder whose options a new run begins with, under a name of its own."""
    resume: str | None = None
    """A run folder whose run is continued from its last checkpoint. Only --steps or --epochs may be
    given with it."""
    dry_run: bool = False
    """Print each role's prompt, token budgets and the memory plan, and end. Needs the model's
    config.json and tokenizer, but no weights and no GPU; writes nothing."""
    num_gpus: PositiveInt | None = None
    """GPUs to plan for in a dry run, with one rank each; None: torchrun's ranks, or 8."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of a GPU in a dry run; None: that of this machine's GPUs."""


def defaults(given: Mapping[str, Any]) -> Options:
    """The defaults that the help shows: those of the given preset and file."""
    own = _own(given, (*SOURCES, *DRY_RUN))
    return apply_args(Options.model_validate(read_config(given).model_dump()), own)


def read_config(given: Mapping[str, Any]) -> Config:
    """The options of the run. Raises UserError when one of them is wrong."""
    options = {name: given[name] for name in given if name not in (*SOURCES, *DRY_RUN)}
    sources = _own(given, SOURCES)
    if sources["resume"] is None:
        file, like = sources["config"], sources["like"]
        if file is not None and like is not None:
            raise UserError("--config and --like exclude each other")
        if file is not None and Path(file).expanduser().is_dir():
            file, like = None, file
        presets = sources["preset"]
        if like is None:
            return load_config(options, presets=presets, file=file)
        file, options = run_file(like), {"name": None, **options}
        return load_config(options, presets=presets, file=file, accept_old_names=True)
    fixed = [name for name in given if name not in ("resume", *FREE_ON_RESUME, *DRY_RUN)]
    if fixed:
        raise UserError(
            f"{as_flag(fixed[0])} cannot be changed when a run is resumed",
            fix="Leave it out (only --steps or --epochs may be given), or start a new run",
        )
    file = run_file(sources["resume"])
    return apply_args(apply_toml(Config(), file, accept_old_names=True), options)


def run_file(run: str) -> Path:
    """The config.toml of a run folder. Raises UserError when there is none."""
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError("there is no such run folder", where=run)
    file = folder / RUN_CONFIG
    if not file.is_file():
        raise UserError(
            "the folder holds no config.toml, so it is not a run",
            where=run,
            fix="Give runs/NAME",
        )
    return file


def run(given: Mapping[str, Any]) -> int:
    """Train, or print what a run would do. The run prints the path of its folder."""
    config = read_config(given)
    note_unread(config, given)
    options = apply_args(Options(), _own(given, (*SOURCES, *DRY_RUN)))
    if options.dry_run:
        from rosd_fast.dry_run import dry_run

        dry_run(config, num_gpus=options.num_gpus, gpu_memory_gib=options.gpu_memory_gib)
        return 0

    if options.resume is None and "name" not in given:
        config = with_free_name(config)

    from rosd_fast.train import train

    train(config, resume=None if options.resume is None else Path(options.resume).expanduser())
    return 0


def note_unread(config: Config, given: Mapping[str, Any]) -> None:
    """Say in a line which options the user has set that the method does not read.

    Those are options of the command line, and of a file of the user's own where it changes their
    value; a run's config.toml has them all.
    """
    from rosd_fast.methods import find_method

    names = [name for name in options_of(Config) if name in given]
    file = given.get("config")
    if file is not None and not is_dump(Path(file).expanduser()):
        before = load_preset(*given.get("preset", ()))
        changed = (n for n in options_of(Config) if _value(config, n) != _value(before, n))
        names += [name for name in changed if name not in given]
    unread = find_method(config.method).unread(config, names)
    if unread and not rank():
        more = f" and {len(unread) - MAX_NAMED} more" if len(unread) > MAX_NAMED else ""
        print(f"the method {config.method} does not read {', '.join(unread[:MAX_NAMED])}{more}")


def _value(config: Config, name: str) -> Any:
    """The value of an option, by its dotted name."""
    return reduce(getattr, name.split("."), config)


def with_free_name(config: Config) -> Config:
    """Options whose name, which a file gives, is no run's yet: X becomes X-2, as a line says."""
    name, out = config.name, Path(config.out).expanduser()
    if name is None or not (out / name).exists():
        return config
    free = next(f"{name}-{n}" for n in count(2) if not (out / f"{name}-{n}").exists())
    if not rank():
        print(f"{out / name} exists already, so this run is {free}")
    return config.model_copy(update={"name": free})


def _own(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options of the command itself, those that are not part of a `Config`."""
    return {name: given.get(name, Options.model_fields[name].default) for name in names}
