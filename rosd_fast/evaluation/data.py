"""The data sets of an evaluation, each with a name and figures of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.config.chat import make_chats
from rosd_fast.data.fitting import fitting
from rosd_fast.data.problems import load_problems
from rosd_fast.data.sources import split_sources
from rosd_fast.model.skeleton import load_skeleton

if TYPE_CHECKING:
    from rosd_fast.config import Config, SourceConfig, VerifyConfig
    from rosd_fast.data.collection import Problems
    from rosd_fast.data.sources import Source


def load_data_sets(
    data: SourceConfig, verify: VerifyConfig, *, first: int = 0
) -> tuple[dict[str, Problems], list[str]]:
    """(the problems of each source by its name, what a user is told of them).

    A source has the name of its file, after that of the folder where several files have it. first:
    only so many problems of each; 0: all. All rows are checked. Raises UserError for a row that is
    not a problem, unless data.bad_rows is skip.
    """
    options = data.as_training().model_copy(update={"check_rows": 0})
    loaded = [
        load_problems(part, data=options, verify=verify, first=first)
        for part in split_sources(options.train)
    ]
    notes = [note for problems in loaded for note in problems.notes()]
    names = distinct_names([problems.parts[0].source for problems in loaded])
    return dict(zip(names, loaded, strict=True)), notes


def fitting_data_sets(
    found: Mapping[str, Problems], config: Config
) -> tuple[dict[str, Problems], list[str]]:
    """(the problems whose prompts the model has room for, lines on the others).

    config: model and chat templates, and data.bad_rows, which says what happens to the others.
    Raises UserError for one of them unless that is skip, and for a data set of nothing else.
    """
    model = load_skeleton(
        config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    chat = make_chats(config.chat, model.tokenizer).eval
    left, notes = {}, []
    for name, problems in found.items():
        left[name], lines = fitting(
            problems,
            chat=chat,
            skip=config.data.bad_rows == "skip",
            context_length=model.context_length,
        )
        notes += [f"{name}: {line}" for line in lines]
    return left, notes


def distinct_names(sources: Sequence[Source]) -> list[str]:
    """A name per source: "test"; "chemistry-test" where chemistry/test.json is one of several
    of that name; with a number where this does not tell them apart either."""
    short = Counter(source.name for source in sources)
    names: list[str] = []
    for source in sources:
        own = source.name or "data"
        folder = source.path.absolute().parent.name
        if short[source.name] > 1 and folder and source.path.exists():
            own = f"{folder}-{own}"
        name, number = own, 1
        while name in names:
            number += 1
            name = f"{own}-{number}"
        names.append(name)
    return names
