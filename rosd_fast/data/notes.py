"""What a user is told of the splits of a run: sizes, overlaps, near-duplicates."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from rosd_fast.config import DataConfig
from rosd_fast.data.checks import spread
from rosd_fast.data.collection import Problems
from rosd_fast.data.instruct import OFF, instruction_of
from rosd_fast.data.keys import normal_text
from rosd_fast.data.similar import Text, similar_pairs
from rosd_fast.data.splits import DEV, Division, describe_overlap, named_pairs
from rosd_fast.types import Problem

MAX_COMPARED = 20_000  # problems per split among which near-duplicates are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """Problems of a split that are looked at closely: the checked ones, or some, spread evenly.

    size: number of problems of the whole split.
    texts: prompt, without instruction, and answer of each.
    sentences: the sentence added to the prompt, "" for none -> number of prompts.
    """

    problems: Problems
    size: int
    texts: list[Text]
    sentences: Counter[str]


def look_at(problems: Problems) -> Looked:
    """Look at the problems of a split."""
    some = problems.checked
    if len(some) > MAX_COMPARED:
        some = some.select(spread(len(some), MAX_COMPARED))
    texts, sentences = [], Counter[str]()
    for index in range(len(some)):
        problem = some.bare(index)
        texts.append((problem.prompt, problem.answer))
        sentences[added_sentence(some, index, problem)] += 1
    return Looked(problems=some, size=len(problems), texts=texts, sentences=sentences)


def added_sentence(problems: Problems, index: int, bare: Problem) -> str:
    """The answer instruction that a problem's prompt ends with; "" for none.

    bare: the problem without it.
    """
    part, _ = problems.place(int(problems.rows[index]))
    return instruction_of(bare, OFF if part.source.is_quickstart else problems.instruction)


def held_out_notes(found: Division, data: DataConfig) -> list[str]:
    """How many problems are held out, if data.dev is a share."""
    if found.held_out is None or data.dev is None:
        return []
    return [
        f"{DEV}: {data.dev.strip()} held out: {len(found.held_out):,} problems, by split_seed "
        f"{data.split_seed}; {len(found.train):,} are left for training"
    ]


def overlap_notes(found: Division, problems: Mapping[str, Problems]) -> list[str]:
    """Which problems are in two splits. problems: of the data that each split was made of."""
    return [
        describe_overlap(each, place_in(problems[each.split]), place_in(problems[each.other]))
        for each in found.overlaps
    ]


def similar_notes(looked: Mapping[str, Looked]) -> list[str]:
    """Which problems have near-duplicates in another split; both stay where they are."""
    notes, names, each = [], [*looked], [*looked.values()]
    texts = [one.texts for one in each]
    for (i, j), pairs in cross_pairs(texts).items():
        count = len({index for index, _ in pairs})
        what = "problem is a near-duplicate" if count == 1 else "problems are near-duplicates"
        shown = named_pairs(pairs, place_in(each[i].problems), "~", place_in(each[j].problems))
        some = sum(len(one.problems) < one.size for one in (each[i], each[j]))
        among = f" (among {len(texts[i]):,} and {len(texts[j]):,} compared)" if some else ""
        notes.append(f"{names[i]}: {count:,} {what} of {names[j]}{among}: {shown}")
    return notes


def cross_pairs(splits: Sequence[Sequence[Text]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(number of a split, number of a later one) -> near-duplicates, by their indices in the two.

    Problems that are the same one are left out.
    """
    texts = [text for split in splits for text in split]
    firsts = [0, *accumulate(len(split) for split in splits)]
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for i, j in similar_pairs(texts).tolist():
        a, b = (int(np.searchsorted(firsts, each, side="right")) - 1 for each in (i, j))
        if a != b and normal_text(texts[i][0]) != normal_text(texts[j][0]):
            found[a, b].append((i - firsts[a], j - firsts[b]))
    return dict(sorted(found.items()))


def place_in(problems: Problems) -> Callable[[int], str]:
    """The place of a problem by its index, relative to the current folder if it is in it."""
    here = f"{Path.cwd()}{os.sep}"
    return lambda index: problems.where(index).removeprefix(here)
