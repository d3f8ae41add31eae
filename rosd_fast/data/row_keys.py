"""The keys of a data set's problems, read from its rows without making problems of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from rosd_fast.data.collection import Part, Problems
from rosd_fast.data.keys import Keys, problem_key
from rosd_fast.data.shapes.maths import read_gsm8k, read_math
from rosd_fast.data.shapes.plain import read_gym, read_own, read_tool_use
from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import PROMPTS
from rosd_fast.errors import UserError

BATCH = 1024  # rows that are read at a time

PLAIN = (read_own, read_gsm8k, read_math, read_gym, read_tool_use)
"""Readers of rows whose prompt is the text of the first of PROMPTS that a row has, as it is."""


def keys_of(problems: Problems) -> Keys:
    """[n] uint64: the key of each problem. A row that cannot be read has a key of its own.

    A million rows take about 10 s and 8 MB.
    """
    rows = np.asarray(problems.rows)
    firsts = [*(part.first for part in problems.parts), np.iinfo(np.int64).max]
    found = [np.empty(0, np.uint64)]
    for part, (first, end) in zip(problems.parts, pairwise(firsts), strict=True):
        inside = rows[slice(*np.searchsorted(rows, (first, end)))] - first
        whole = np.empty(len(part.rows), np.uint64) if len(inside) else found[0]
        for start in range(0, len(whole), BATCH):
            stop = min(start + BATCH, len(whole))
            whole[start:stop] = [*part_keys(part, start, stop)]
        found.append(whole[inside])
    return np.concatenate(found)


def part_keys(part: Part, start: int, stop: int) -> Iterator[int]:
    """The keys of rows of a source, from `start` to before `stop`."""
    mapped = part.source.columns.get("prompt")
    columns = (mapped,) if mapped else PROMPTS
    is_plain = part.shape.read in PLAIN and (mapped is not None or not part.source.columns)
    for number, row in enumerate(part.rows.batch(start, stop), start=start):
        text = plain_prompt(row, columns) if is_plain else None
        yield read_key(part, row, number) if text is None else problem_key(text)


def plain_prompt(row: Any, columns: tuple[str, ...]) -> str | None:
    """The text of the first of the columns that the row has; None where it takes a closer look."""
    if type(row) is dict:
        for name in columns:
            if (value := row.get(name)) is not None:
                is_text = type(value) is str and value and not value.isspace()
                return value if is_text else None
    return None


def read_key(part: Part, row: Any, number: int) -> int:
    """The key of the problem in a row, as its shape reads it."""
    if isinstance(row, Mapping):
        try:
            fields = part.shape.read(Row(row, columns=part.source.columns))
            return problem_key(fields.prompt, fields.context)
        except UserError:
            pass  # it is found when the row is checked, or drawn
    return problem_key(f"\x00 row {part.first + number} cannot be read")
