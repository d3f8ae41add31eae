"""What an unknown name of an option was probably meant to be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import SequenceMatcher, get_close_matches

from rosd_fast.config import synonyms

MIN_SIMILARITY = 0.65  # of 1, of a name that is suggested for an unknown one
SURE = 0.85  # from here on a name in the same section is a slip rather than another trainer's word
OTHER_SECTION = 0.75  # similarity of equal keys in sections that have nothing in common
NO_SECTION = 0.85  # and where the unknown name has no section


def suggestion(name: str, known: Collection[str], spell: Callable[[str], str]) -> str | None:
    """What to tell a user who named an unknown option, as in "Did you mean --optim.lr?".

    name: dotted and with underscores. known: the names of the options there are. spell: writes one.
    None when no option is similar enough, and none has this name elsewhere.
    """
    section, dot, key = name.rpartition(".")
    slips = [other for other in known if other.startswith(section + dot)] if section else []
    found = nearest(name, slips)
    if found is not None and _ratio(key, found.rpartition(".")[2]) >= SURE:
        return _did_you_mean([found], spell)
    for called in dict.fromkeys((name, key)):
        if meant := _synonym(_plain(called), known, spell):
            return meant
    if members := [other for other in known if other.startswith(f"{name}.")]:
        return f"{name} is a group of options, such as {spell(members[0])}"
    if (found := nearest(name, known)) is not None:
        return _did_you_mean([found], spell)
    slip = get_close_matches(_plain(key), [*_OPTIONS, *_ADVICE], n=1, cutoff=SURE)
    return _synonym(slip[0], known, spell) if slip else None


def _synonym(word: str, known: Collection[str], spell: Callable[[str], str]) -> str | None:
    """What another trainer's word means here; None: nothing that this command has."""
    if options := [option for option in _OPTIONS.get(word, ()) if option in known]:
        return _did_you_mean(options, spell)
    return _ADVICE.get(word)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to `name`; None when none is similar enough.

    The last part of a name counts most, so `group_sise` finds `sample.group_size`, and `loss.foo`
    finds nothing in the section loss.
    """
    best = max(known, key=lambda other: _similarity(name, other), default=None)
    return best if best is not None and _similarity(name, best) >= MIN_SIMILARITY else None


def _similarity(name: str, other: str) -> float:
    """How similar two dotted names are, of 1."""
    section, _, key = name.rpartition(".")
    other_section, _, other_key = other.rpartition(".")
    keys = max(_ratio(key, other_key), _ratio(key.removeprefix("no_"), other_key))
    if section == other_section:
        return keys
    if section and other_section:
        shared = _ratio(section, other_section)
        return keys * (OTHER_SECTION + (1 - OTHER_SECTION) * shared)
    joined = _ratio(name.replace(".", "_"), other.replace(".", "_"))
    return max(NO_SECTION * keys, joined if joined >= SURE else 0)


def _ratio(text: str, other: str) -> float:
    return SequenceMatcher(None, text, other).ratio()


def _did_you_mean(options: Iterable[str], spell: Callable[[str], str]) -> str:
    return f"Did you mean {' or '.join(map(spell, options))}?"


def _plain(name: str) -> str:
    """The name as it is looked up among those of others."""
    return name.lower().replace("-", "").replace("_", "")


def _entries(table: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(name, the text behind it), one name at a time."""
    for names, text in table:
        for name in names.split():
            yield _plain(name), text


_OPTIONS = {
    name: options.split()
    for name, options in _entries((names, own) for own, names in synonyms.OPTIONS.items())
}
_ADVICE = dict(_entries(synonyms.ADVICE.items()))
