"""Load problems: open the sources, recognize their shapes, check rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from rosd_fast.config import DataConfig, VerifyConfig
from rosd_fast.data.checks import check
from rosd_fast.data.collection import Part, Problems
from rosd_fast.data.readers.base import Rows
from rosd_fast.data.readers.open import open_rows
from rosd_fast.data.shapes import Shape, recognize
from rosd_fast.data.sources import Source, parse_sources
from rosd_fast.data.verifiable import AnswerCheck
from rosd_fast.errors import UserError
from rosd_fast.verify import Limits

LOOKED_AT = 100  # first rows of a source by which its shape is recognized


def load_problems(
    text: str,
    *,
    data: DataConfig | None = None,
    verify: VerifyConfig | None = None,
    first: int = 0,
) -> Problems:
    """The problems of the sources in `text`, such as "a.jsonl,b.parquet@weight=0.5".

    data: how they are read and checked; text stands for its train. verify: limits of the processes
    in which verifiers judge whether an answer can be given. first: only so many problems,
    the first ones, all of them checked; 0: all problems, of which data.check_rows are checked.

    Raises UserError, with file, row and column, for what is not a problem.
    """
    data = data or DataConfig()
    return check(open_problems(text, data=data, verify=verify), data, first)


def open_problems(text: str, *, data: DataConfig, verify: VerifyConfig | None = None) -> Problems:
    """The same problems, none of which is checked. Raises UserError for what cannot be read."""
    answers = AnswerCheck(Limits(**verify.model_dump()) if verify else None)
    if data.verifier is not None:
        answers.open(data.verifier, "data.verifier")
    sources = parse_sources(text, verifier=data.verifier, columns=data.columns.model_dump())
    for source in sources:
        if source.verifier is not None and source.verifier != data.verifier:
            answers.open(source.verifier, source.text)
    parts = open_parts(sources)
    total = sum(len(part.rows) for part in parts)
    if not total:
        raise UserError("the data set has no problems", where=text)
    return Problems(parts, range(total), instruction=data.answer_instruction, answers=answers)


def open_parts(sources: Sequence[Source]) -> list[Part]:
    """The sources, opened, and their shapes recognized. Raises UserError."""
    parts, total = [], 0
    for source in sources:
        rows = open_rows(source)
        if len(rows):
            parts.append(Part(source=source, rows=rows, shape=shape_of(rows, source), first=total))
        elif len(sources) > 1:
            raise UserError("the data set has no problems", where=source.text)
        total += len(rows)
    return parts


def shape_of(rows: Rows, source: Source) -> Shape:
    """The shape of a source's rows, by the first that can be read. Raises UserError."""
    sample = []
    for number in range(min(LOOKED_AT, len(rows))):
        with suppress(UserError):  # it is reported when the rows are checked
            sample.append(rows[number])
    return recognize(sample, source)
