"""Read presets, TOML files and the command line into one `Config`.

    Config's defaults < presets, in their order < --config FILE.toml < command line

A later layer replaces single options. TOML has no null, so in a file `false` means none for an
option that can be none (no such option is a switch). On the command line it is `none`.

Of two options that say the same thing, such as steps and epochs, the later layer's counts.

A layer with its own training problems does not inherit the quickstart's development problems.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rosd_fast.config import Config
from rosd_fast.config.alternatives import both_given, with_alternatives
from rosd_fast.config.arguments import as_flag, options_of
from rosd_fast.config.messages import explain
from rosd_fast.config.renamed import (
    REMOVED,
    RENAMED,
    legacy_options,
    old_names,
    removed_names,
    translate,
)
from rosd_fast.config.suggest import nearest
from rosd_fast.config.toml import find_line, to_toml
from rosd_fast.errors import UserError
from rosd_fast.quickstart import QUICKSTART

__all__ = [
    "apply_args",
    "apply_toml",
    "config_hash",
    "load_config",
    "load_preset",
    "preset_names",
    "to_toml",
]

PRESETS = Path(__file__).parent.parent / "presets"
DEFAULT_PRESET = "quickstart"

# Options that change neither the data of a step nor its update.
NOT_HASHED: dict[str, Any] = {
    "steps": True,
    "epochs": True,
    "out": True,
    "name": True,
    "dump_rollouts": True,
    "data": {"dev", "dev_ood", "check_rows"},
    "verify": True,
    "select": {"warn_after_steps", "stop_after_steps"},
    "chat": {"eval"},
    "eval": True,
    "checkpoint": True,
    "diagnose": True,
    "parallel": True,
    "learner": True,
    "optim": {"offload"},
}

Model = TypeVar("Model", bound=BaseModel)


def preset_names() -> list[str]:
    """The names of the presets that are part of the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset. Raises UserError when there is no such preset."""
    if name not in preset_names():
        near = nearest(name, preset_names())
        known = f"Known are {', '.join(preset_names())}"
        raise UserError(
            f"there is no preset {name!r}", fix=f"Did you mean {near}? {known}" if near else known
        )
    return PRESETS / f"{name}.toml"


def preset_model(name: str) -> str | None:
    """The value of `model` that a preset sets; None: it leaves the model open."""
    return tomllib.loads(_read(preset_path(name))).get("model")


def is_built_in(model: str) -> bool:
    """Whether the option `model` names a model that a preset is named after."""
    return model in preset_names() and preset_model(model) == model


@cache
def load_preset(*names: str) -> Config:
    """The options of presets, of which a later one replaces single options of an earlier one.

    Raises UserError when there is no such preset, or when two of them do not go together.
    """
    config = Config()
    for name in names:
        config = apply_toml(config, preset_path(name))
    return config


def load_config(
    given: Mapping[str, Any],
    *,
    presets: Sequence[str] = (),
    file: str | Path | None = None,
    accept_old_names: bool = False,
) -> Config:
    """Apply all layers in order; `given` is what the command line sets, as `read_args` returns it.

    accept_old_names: as for `apply_toml`, for `file`.

    A model that is the name of a preset stands for the model of that preset and brings its options,
    after those of `presets`. Without a preset, a file and a model, the preset quickstart is used.
    """
    given, presets = dict(given), [*presets]
    if not presets and file is None:
        given.setdefault("model", DEFAULT_PRESET)
    name = given.get("model")
    if name in preset_names() and (is_built_in(name) or not Path(name).is_dir()):
        given["model"] = preset_model(name)
        if given["model"] is None:
            raise UserError(f"{name} is a preset, not a model", fix=f"Give --preset {name}")
        if not (presets or file) or not is_built_in(name):
            presets.append(name)
    config = load_preset(*presets)
    if file is not None:
        config = apply_toml(config, Path(file).expanduser(), accept_old_names=accept_old_names)
    return apply_args(config, given)


def apply_toml(base: Config, path: Path, *, accept_old_names: bool = False) -> Config:
    """`base` with the options that a TOML file sets.

    accept_old_names: read options that were renamed since under their old names too, as the
    config.toml of a resumed run may have them.

    Raises UserError, with file and line, for a file that cannot be read, an unknown key, an old
    name and a wrong value.
    """
    text = _read(path)
    try:
        layer = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        what, _, place = str(error).partition(" (at ")
        line = re.search(r"line (\d+)", place)
        number = line[1] if line else len(text.rstrip().split("\n"))
        raise UserError(f"malformed TOML ({what})", where=f"{path}:{number}") from None
    if accept_old_names:
        layer = translate(layer)
    if found := old_names(layer):
        line = find_line(text, tuple(found[0].split(".")))
        names = ", ".join(f"{old} is now {RENAMED[old]}" for old in found)
        raise UserError(names, where=f"{path}:{line}")
    if gone := removed_names(layer):
        line = find_line(text, tuple(gone[0].split(".")))
        raise UserError(f"{gone[0]} {REMOVED[gone[0]]}", where=f"{path}:{line}")
    layer = _false_to_none(layer, Config)
    if (both := both_given(layer)) is not None:
        line = find_line(text, tuple(both[0].split(".")))
        raise UserError(f"{both[0]} and {both[1]} exclude each other", where=f"{path}:{line}")
    layer = with_alternatives(layer)
    merged = _merge(_without_quickstart_dev(base, layer).model_dump(mode="json"), layer)
    try:
        # Strict mode accepts a list for a tuple only in JSON.
        return Config.model_validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        raise explain(
            error,
            Config,
            spell=lambda name: name,
            show=lambda value: json.dumps(value, ensure_ascii=False),
            where=lambda keys: f"{path}:{find_line(text, keys)}",
        ) from None


def apply_args(base: Model, given: Mapping[str, Any]) -> Model:
    """`base` with the options that the command line sets, as `read_args` returns them."""
    layer: dict[str, Any] = {}
    for name, value in given.items():
        *tables, key = name.split(".")
        table = layer
        for part in tables:
            table = table.setdefault(part, {})
        table[key] = value
    if (both := both_given(layer)) is not None:
        raise UserError(f"{as_flag(both[0])} and {as_flag(both[1])} exclude each other")
    layer = with_alternatives(layer)
    if isinstance(base, Config):
        base = _without_quickstart_dev(base, layer)
    try:
        return type(base).model_validate(_merge(base.model_dump(), layer))
    except ValidationError as error:
        raise explain(error, type(base), spell=as_flag, show=repr, where=lambda keys: "") from None


def config_hash(config: Config) -> str:
    """16 hex digits over the options that decide what is learned; a longer run keeps its hash.

    Checkpoints hold it, so it must not change when an option is renamed or added.
    """
    left_out: dict[str, Any] = dict(NOT_HASHED)
    if config.data.holds_out:
        left_out["data"] = NOT_HASHED["data"] - {"dev"}
    hashed, defaults = (
        options.model_dump(mode="json", exclude=left_out) for options in (config, Config())
    )
    options = legacy_options(hashed, defaults)
    text = json.dumps(options, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the text is not UTF-8", where=str(path)) from None
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path)) from None
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", where=str(path)) from None


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _false_to_none(layer: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    nullable = {name for name, option in options_of(model).items() if option.nullable}

    def walk(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: walk(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else (None if value is False and prefix + key in nullable else value)
            for key, value in table.items()
        }

    return walk(layer, "")


def _without_quickstart_dev(base: Config, layer: Mapping[str, Any]) -> Config:
    """`base`, without the quickstart's development data if `layer` has other training data."""
    data = layer.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    if not isinstance(train, str) or train.startswith(QUICKSTART):
        return base
    dropped = {
        split: None
        for split in ("dev", "dev_ood")
        if (getattr(base.data, split) or "").startswith(QUICKSTART)
    }
    return base.model_copy(update={"data": base.data.model_copy(update=dropped)})
