"""The data of a run: training problems and development splits, no problem in two of them.

data.train, data.dev, data.dev_ood -> Problems -> keys -> divide -> Datasets
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rosd_fast.config import DataConfig, VerifyConfig
from rosd_fast.data.checks import check
from rosd_fast.data.collection import Problems
from rosd_fast.data.instruct import describe_instructions
from rosd_fast.data.notes import held_out_notes, look_at, overlap_notes, similar_notes
from rosd_fast.data.problems import load_problems, open_problems
from rosd_fast.data.row_keys import keys_of
from rosd_fast.data.splits import DEV, OOD, TRAIN, Division, divide, parse_share
from rosd_fast.errors import UserError
from rosd_fast.text.printable import printable

SHORT = {DEV: "dev", OOD: "ood"}  # names of the splits in metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets:
    """The data of a run.

    dev: "dev" and "ood", those that were asked for, cut to eval.problems.
    about: option, such as data.train -> lines on what it was read as, and the answer instruction.
    shared: lines on what is held out, is in two splits, or is nearly the same in two.
    """

    train: Problems
    dev: dict[str, Problems]
    about: dict[str, list[str]]
    shared: list[str]

    @property
    def notes(self) -> list[str]:
        """What a user is told at the start of a run."""
        about = [f"{name}: {line}" for name, lines in self.about.items() for line in lines]
        return [printable(line, keep="") for line in (*about, *self.shared)]


def load_datasets(
    data: DataConfig, *, verify: VerifyConfig | None = None, first: int = 0
) -> Datasets:
    """Load the data of a run. Raises UserError, with file, row and column, for what is wrong.

    verify: limits of the processes in which verifiers judge whether an answer can be given. first:
    number of problems per development split; 0: all. All of these are checked, since an
    evaluation reads them, and data.check_rows of the training rows.

    Where there is a development split, every training row is read once for its key.
    """
    share = parse_dev(data)
    train = load_problems(data.train, data=data, verify=verify)
    given = {DEV: None if share is not None else data.dev, OOD: data.dev_ood}
    opened = {
        name: open_problems(text, data=data, verify=verify) for name, text in given.items() if text
    }
    splits, shared = {TRAIN: train}, []
    if share is not None or opened:
        found = divide_data(train, opened, data, share)
        splits[TRAIN] = train.select(found.train)
        if found.held_out is not None:
            chosen = np.sort(found.held_out[: first or None])
            splits[DEV] = checked_whole(train.select(chosen), data)
        elif DEV in opened:
            splits[DEV] = checked_whole(opened[DEV], data, first)
        if found.ood is not None:
            splits[OOD] = checked_whole(opened[OOD].select(found.ood), data, first)
        shared += held_out_notes(found, data)
        shared += overlap_notes(found, {TRAIN: train, **opened})
    looked = {name: look_at(each) for name, each in splits.items() if not is_shipped(each)}
    about = {TRAIN: train.notes(), **{name: splits[name].notes() for name in opened}}
    for name, each in looked.items():
        about.setdefault(name, []).extend(describe_instructions(each.sentences))
    return Datasets(
        train=splits[TRAIN],
        dev={SHORT[name]: splits[name] for name in SHORT if name in splits},
        about=about,
        shared=[*shared, *similar_notes(looked)],
    )


def parse_dev(data: DataConfig) -> float | None:
    """The share that data.dev holds out; None: it names data, as the other two always do.

    Raises UserError for a share that cannot be held out.
    """
    for name, text in ((TRAIN, data.train), (OOD, data.dev_ood)):
        if text is not None and parse_share(text, where=name) is not None:
            raise UserError(
                f"{text!r} is a share, not data",
                where=name,
                fix=f"Hold a share of the training problems out with data.dev={text.strip()}",
            )
    return None if data.dev is None else parse_share(data.dev)


def is_shipped(problems: Problems) -> bool:
    """Whether they are the quickstart's, of which there is nothing to tell."""
    return all(part.source.is_quickstart for part in problems.parts)


def divide_data(
    train: Problems, opened: dict[str, Problems], data: DataConfig, share: float | None
) -> Division:
    """Divide the problems by their keys. opened: the data that development splits name."""
    keys = {name: keys_of(problems) for name, problems in opened.items()}
    return divide(
        keys_of(train),
        dev=keys.get(DEV),
        ood=keys.get(OOD),
        share=share,
        seed=data.split_seed,
        drop=data.overlap == "drop",
    )


def checked_whole(problems: Problems, data: DataConfig, first: int = 0) -> Problems:
    """The problems, or the first ones, each of which is checked. Raises UserError."""
    if problems.is_checked:
        return problems[:first] if first else problems
    return check(problems, data.model_copy(update={"check_rows": 0}), first)
