"""The data of a run: training problems and development splits, none of which is in two of them.

    data.train, data.dev, data.dev_ood -> Problems -> keys -> divide -> Datasets
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import overload

import numpy as np

from rosd_fast.config import DataConfig
from rosd_fast.data.checks import examine
from rosd_fast.data.collection import Problems
from rosd_fast.data.instruct import OFF, describe_instructions, instruction_of
from rosd_fast.data.keys import Keys
from rosd_fast.data.problems import load_problems, open_problems
from rosd_fast.data.row_keys import keys_of
from rosd_fast.data.similar import Text, similar_pairs
from rosd_fast.data.splits import DEV, NAMED, OOD, TRAIN, Division, describe_overlap, divide
from rosd_fast.data.splits import parse_share
from rosd_fast.errors import UserError
from rosd_fast.text.printable import printable

NAMES = {DEV: "dev", OOD: "ood"}  # of the splits in metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets:
    """The data of a run.

    dev: "dev" and "ood", those that were asked for, cut to eval.problems.
    notes: a line on each source, and on what was held out, left out or is nearly the same.
    """

    train: Problems
    dev: dict[str, Problems]
    notes: tuple[str, ...]


def load_datasets(data: DataConfig, *, first: int = 0) -> Datasets:
    """Load the data of a run. Raises UserError, with file, row and column, for what is wrong.

    first: number of problems per development split, 0: all. Each row of a development split is
    checked, since an evaluation reads them all; of the training rows data.check_rows are.

    The training rows are read once for their keys when there is a development split.
    """
    share = None if data.dev is None else parse_share(data.dev)
    for name in (TRAIN, OOD):
        refuse_share(getattr(data, name.removeprefix("data.")), where=name)
    train = load_problems(data.train, data=data)
    given = {DEV: None if share is not None else data.dev, OOD: data.dev_ood}
    opened = {name: open_problems(text, data=data) for name, text in given.items() if text}
    if share is None and not opened:
        return Datasets(train=train, dev={}, notes=tuple(source_notes({TRAIN: train})))
    keys = {name: keys_of(problems) for name, problems in opened.items()}
    found = divide(
        keys_of(train),
        dev=keys.get(DEV),
        ood=keys.get(OOD),
        share=share,
        seed=data.split_seed,
        drop=data.overlap == "drop",
    )
    splits = {TRAIN: train.select(found.train)}
    if found.held_out is not None:
        splits[DEV] = checked_whole(train, found.held_out, data, first)
    elif DEV in opened:
        splits[DEV] = checked_whole(opened[DEV], range(len(opened[DEV])), data, first)
    if found.ood is not None:
        splits[OOD] = checked_whole(opened[OOD], found.ood, data, first)
    notes = [
        *source_notes({TRAIN: train, **opened}),
        *held_out_notes(found, data),
        *overlap_notes(found, {TRAIN: train, **opened}),
        *similar_notes({name: problems.checked for name, problems in splits.items()}),
    ]
    return Datasets(
        train=splits[TRAIN],
        dev={short: splits[name] for name, short in NAMES.items() if name in splits},
        notes=tuple(notes),
    )


def refuse_share(text: str | None, *, where: str) -> None:
    """Raise UserError if `text` is a share: only data.dev can be one."""
    if text is not None and parse_share(text, where=where) is not None:
        raise UserError(
            f"{text!r} is a share, not data", where=where, fix=f"Hold it out: data.dev={text}"
        )


def checked_whole(
    problems: Problems, indices: Sequence[int] | np.ndarray, data: DataConfig, first: int
) -> Problems:
    """The good problems at `indices`, at most `first` of them, in file order; all are checked.

    Raises UserError for a bad row, unless data.bad_rows is skip.
    """
    good: dict[int, Problem] = {}
    places: dict[str, int] = {}
    ...
