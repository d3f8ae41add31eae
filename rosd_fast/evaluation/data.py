"""The data sets of an evaluation, each with a name and figures of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rosd_fast.data.problems import load_problems
from rosd_fast.data.sources import split_sources

if TYPE_CHECKING:
    from rosd_fast.config import SourceConfig, VerifyConfig
    from rosd_fast.data.collection import Problems


def load_data_sets(
    data: SourceConfig, verify: VerifyConfig, *, first: int = 0
) -> tuple[dict[str, Problems], list[str]]:
    """(the problems of each source by its name, what a user is told of them).

    Sources of one name are numbered. first: only so many problems of each; 0: all. All rows are
    checked. Raises UserError for a row that is not a problem, unless data.bad_rows is skip.
    """
    options = data.as_training().model_copy(update={"check_rows": 0})
    found, notes = {}, []
    for part in split_sources(options.train):
        problems = load_problems(part, data=options, verify=verify, first=first)
        notes += problems.notes()
        own = name = problems.recognized[0][0].name or "data"
        number = 1
        while name in found:
            number += 1
            name = f"{own}-{number}"
        found[name] = problems
    return found, notes
