"""Read the evaluation of another model, to compare with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.evaluation.folder import read_completions, read_settings
from rosd_fast.evaluation.settings import changed

if TYPE_CHECKING:
    from rosd_fast.evaluation.evaluation import Evaluation
    from rosd_fast.evaluation.records import Completion


def read_other(
    folder: Path, evaluation: Evaluation, note: Callable[[str], None]
) -> tuple[str, list[Completion]]:
    """(the name of the model, its completions of the data sets that both evaluations have).

    note: is told of settings that differ, besides the model. Raises UserError when no data set is
    in both, or when one has other problems there.
    """
    settings = read_settings(folder)
    before, now = settings["identity"], evaluation.identity
    shared = before["data"].keys() & now["data"].keys()
    if not shared:
        raise UserError(
            f"has no data set in common with {', '.join(now['data'])}: it is of "
            f"{', '.join(before['data'])}",
            where=str(folder),
        )
    for name in sorted(shared):
        if (different := changed(before["data"][name], now["data"][name])) is not None:
            raise UserError(
                f"has other problems in the data set {name}: {different}",
                where=str(folder),
                fix="Evaluate both models on the same file",
            )
    for part in ("sampling", "chat", "dtype", "engine", "verifiers"):
        if (different := changed({part: before.get(part)}, {part: now.get(part)})) is not None:
            note(f"{folder} was sampled differently: {different}")
    samples = before["sampling"]["samples"] if before["sampling"]["temperature"] else 1
    completions = [c for c in read_completions(folder, samples=samples) if c.split in shared]
    total = sum(len(evaluation.problems[name]) for name in shared)
    if not completions:
        raise UserError(
            "has no completions yet",
            where=str(folder),
            fix=f"Finish it first: rosd-fast eval --resume {folder}",
        )
    if (done := len({c.key for c in completions})) < total:
        note(f"{folder} is not finished: it has {done:,} of {total:,} problems")
    return settings["model"]["name"], completions
