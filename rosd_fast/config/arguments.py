"""Options by name, in TOML files and on the command line.

The names come from the pydantic models: `sample.group_size` is a key in a file's [sample] table and
`--sample.group-size` on the command line. tyro renders the help from the same models. It does not
read the arguments: that is done here, so that every mistake is one line that names the option, in
the same words as for a file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from rosd_fast.config.renamed import REMOVED, RENAMED
from rosd_fast.config.suggest import suggestion
from rosd_fast.errors import UserError

BOOLEANS = ("true", "false", "yes", "no", "1", "0", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a model. `name` is dotted: `sample.group_size`."""

    name: str
    num_values: int  # values on the command line; 0: a switch, --name, --no-name or --name false
    nullable: bool  # whether it can be none
    repeated: bool = False  # whether it may be given several times, which adds up

    @property
    def flag(self) -> str:
        return as_flag(self.name)


def as_flag(name: str) -> str:
    """The flag of an option: --sample.group-size for sample.group_size."""
    return "--" + name.replace("_", "-")


def options_of(model: type[BaseModel], prefix: str = "") -> dict[str, Option]:
    """The options of a model and of the models nested in it, by name."""
    found: dict[str, Option] = {}
    for key, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= options_of(kind, f"{prefix}{key}.")
            continue
        name = prefix + key
        found[name] = Option(
            name=name,
            num_values=_num_values(kind),
            nullable=NoneType in get_args(kind),
            repeated=_is_sequence(kind),
        )
    return found


def _num_values(kind: Any) -> int:
    if kind is bool:
        return 0
    return len(get_args(kind)) if get_origin(kind) is tuple and not _is_sequence(kind) else 1


def _is_sequence(kind: Any) -> bool:
    """Whether a type is a tuple of any length, as in tuple[str, ...]."""
    return get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis


def read_args(
    args: Sequence[str],
    options: Mapping[str, Option],
    positional: Sequence[str] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values that the arguments set, by option name, as text: {"sample.group_size": "8"}.

    The value of a switch is True or False, or the word after it where that is one of `BOOLEANS`; so
    in `--trust-remote-code MODEL` the model is an argument of its own. The value of an option with
    two values is a list of two, and `none` is None where an option can be none. A later value
    replaces an earlier one, but those of a repeated option add up: `--preset a,b --preset c` is
    ["a", "b", "c"].

    positional: options that may be given without their names, in this order.
    aliases: other names of options, which help and messages do not use: {"data": "data.source"}.

    Raises UserError for an unknown option, a missing value and an unexpected argument, and
    ValueError for an alias that is an option's name, or names none.
    """
    wrong = [name for name, own in aliases.items() if name in options or own not in options]
    if wrong:
        raise ValueError(f"alias {wrong[0]}: it is an option already, or its option does not exist")
    named = {**options, **{name: options[own] for name, own in aliases.items()}}
    values: dict[str, Any] = {}
    rest = deque(args)
    places = iter(positional)
    fix = "Options are written --name value"
    while rest:
        arg = rest.popleft()
        _check_text(arg)
        if arg.startswith("-") and arg != "-":
            body, equals, text = arg.partition("=")
            option, state = _find(body, named, options)
            value = _value(option, state, text if equals else None, rest)
            if option.repeated:
                value = [*values.get(option.name, ()), *listed(value)]
            values[option.name] = value
            if value is True:
                fix = f"{option.flag} takes true or false"
        elif (name := next(places, None)) is not None:
            values[name] = arg
        else:
            fix = suggestion(arg, options, as_flag) or fix
            raise UserError(f"unexpected argument {arg!r}", fix=fix)
    return values


def _find(
    arg: str, named: Mapping[str, Option], options: Mapping[str, Option]
) -> tuple[Option, bool]:
    """(the option that `arg` names, False if it is negated, as in --data.no-shuffle).

    named: the options by all their names, of which `options` has the ones that are suggested.
    """
    name = arg.lstrip("-").replace("-", "_")
    if arg.startswith("--"):
        if name in named:
            return named[name], True
        table, dot, key = name.rpartition(".")
        positive = table + dot + key.removeprefix("no_")
        if positive in options and not options[positive].num_values:
            return options[positive], False
    if RENAMED.get(name) in options:
        raise UserError(f"--{arg.lstrip('-')} is now {as_flag(RENAMED[name])}")
    if name in REMOVED:
        raise UserError(f"--{arg.lstrip('-')} {REMOVED[name]}")
    fix = suggestion(name, options, as_flag) or "See --help for all options"
    raise UserError(f"unknown option {arg}", fix=fix)


def _value(option: Option, state: bool, text: str | None, rest: deque[str]) -> Any:
    """The value of `option`: the text after its "=" (`text`), or the arguments that follow.

    rest: the arguments that are left, of which the value is taken.
    """
    if not option.num_values:
        if text is None and rest and rest[0].lower() in BOOLEANS:
            text = rest.popleft()
        if text is not None and not state:
            raise UserError(f"{option.flag} takes no value when it is negated")
        return state if text is None else text
    found = [] if text is None else [text]
    while len(found) < option.num_values:
        if not rest or rest[0].startswith("--"):
            needs = "a value" if option.num_values == 1 else f"{option.num_values} values"
            raise UserError(f"{option.flag} needs {needs}", fix="See --help")
        _check_text(rest[0])
        found.append(rest.popleft())
    if option.nullable and found[0].lower() == "none":
        return None
    return found[0] if option.num_values == 1 else found


def _check_text(arg: str) -> None:
    try:
        arg.encode()
    except UnicodeEncodeError:
        raise UserError(f"the argument {arg!r} is not UTF-8") from None


def listed(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]
