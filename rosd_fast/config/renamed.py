"""Options that had another name before or are gone, and what that means for runs of that time.

A file or a command line with an old name is an error that gives the new one. A run that is resumed
may have been written with the old names: its config.toml is translated, and its checkpoints hold a
hash over them, so `legacy_options` spells options the old way before they are hashed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "loss.is_clip": "loss.importance_clip",
    "teacher.where": "teacher.backend",
    "teacher.server_bound": "teacher.max_logprob_gap",
    "engine.probe_bound": "engine.max_logprob_gap",
    "optim.only": "optim.trainable",
    "select.require_success": "select.on_no_success",
}

REMOVED = {
    "learner.compile": "is no longer an option, as it compiled anew for every batch; leave it out"
}
"""Options that are gone, and what a user is told. None of them changed what is learned."""

VALUES: dict[str, dict[Any, Any]] = {"select.require_success": {True: "skip", False: "keep"}}
"""Old values of renamed options -> the values that mean the same now."""

ADDED_LATER = (
    "method",
    "compat",
    "chat",
    "span.thinking",
    "optim.schedule",
    "optim.warmup_frac",
    "optim.min_lr_frac",
    "optim.decay_frac",
    "optim.lr_scale",
    "optim.decay",
    "optim.kind",
    "policy",
    "loss.distill_weight",
    "loss.policy_weight",
    "optim.updates_per_step",
    "teacher.demonstration_note",
    "teacher.model",
    "teacher.solution_template",
    "teacher.show_feedback",
    "reflect.control",
    "span.control",
    "span.negative_weight",
    "select.on_lone_success",
    "data.split_seed",
    "data.bad_rows",
    "data.columns",
    "lora.quantize",
)
"""Options, or whole sections, that runs did not have when hashing began. Each counts in the hash
only where it differs from its default. A new option that decides what is learned belongs here."""


BEFORE = {"data.answer_instruction": "off", "data.overlap": "keep"}
"""Options that runs did not have either, and the value that means what such runs did: it is not the
default. A resumed run whose config.toml lacks the option gets this value."""


def old_names(layer: Mapping[str, Any]) -> list[str]:
    """The old names among the options that a TOML file sets, in the order of `RENAMED`."""
    return [old for old in RENAMED if _has(layer, old)]


def removed_names(layer: Mapping[str, Any]) -> list[str]:
    """The options of a TOML file that are gone."""
    return [name for name in REMOVED if _has(layer, name)]


def translate(layer: dict[str, Any]) -> dict[str, Any]:
    """The options of a TOML file with each old name replaced by the new one.

    An option that is given under both names keeps its old name, which is then reported. An option
    of `BEFORE` that the file lacks is added, and one of `REMOVED` is left out.
    """
    for name in removed_names(layer):
        section, _, key = name.partition(".")
        layer = {**layer, section: {k: v for k, v in layer[section].items() if k != key}}
    for old in old_names(layer):
        new = RENAMED[old]
        if not _has(layer, new):
            layer = _moved(layer, old, new, VALUES.get(old, {}))
    for name, value in BEFORE.items():
        section, _, key = name.partition(".")
        if isinstance(layer.get(section), Mapping) and not _has(layer, name):
            layer = {**layer, section: {**layer[section], key: value}}
    return layer


def legacy_options(options: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, a dump of a `Config`, under the names that they were first hashed with."""
    legacy = dict(options)
    for name in (*ADDED_LATER, *BEFORE):
        section, _, key = name.rpartition(".")
        before = BEFORE.get(name, defaults.get(section, {}).get(key))
        if section and _has(legacy, name) and legacy[section][key] == before:
            legacy[section] = {k: v for k, v in legacy[section].items() if k != key}
        elif not section and name in legacy and legacy[name] == defaults[name]:
            del legacy[name]
    for old, new in RENAMED.items():
        was = {value: name for name, value in VALUES.get(old, {}).items()}
        legacy = _moved(legacy, new, old, was)
    return legacy


def _has(table: Mapping[str, Any], name: str) -> bool:
    section, _, key = name.partition(".")
    inner = table.get(section)
    return isinstance(inner, Mapping) and key in inner


def _moved(
    table: dict[str, Any], name: str, target: str, values: Mapping[Any, Any]
) -> dict[str, Any]:
    """`table` with the value of `name` under `target`, a name in the same section.

    values: what a value becomes; one that is not among them stays.
    """
    section, _, key = name.partition(".")
    new_key = target.partition(".")[2]
    inner = dict(table[section])
    if key in inner:
        value = inner.pop(key)
        known = isinstance(value, str | bool)
        inner[new_key] = values.get(value, value) if known else value
    return {**table, section: inner}
