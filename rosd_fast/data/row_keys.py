"""The keys of a data set's problems, read from its rows without making problems of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
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
"""Readers whose prompt is the text of the first of PROMPTS that a row has, as it is there."""


def keys_of(problems: Problems) -> Keys:
    """[n] uint64: the key of each problem. A row that cannot be read has a key of its own.

    A million rows of 200 characters take about 10 s, and 8 MB.
    """
    rows = np.asarray(problems.rows)
    found = []
    for part, end in zip(problems.parts, _ends(problems), strict=True):
        inside = rows[(rows >= part.first) & (rows < end)] - part.first
        keys = array("Q")
        for start, stop in _batches(inside):
            keys.extend(_keys(part, start, stop))
            ...
    return np.concatenate(found)
