"""The rows of a source, whatever it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rosd_fast.data.gym import GymRows
from rosd_fast.data.readers.arrow import open_arrow, open_parquet
from rosd_fast.data.readers.base import ChainedRows, ListRows, Rows
from rosd_fast.data.readers.csv import open_csv
from rosd_fast.data.readers.files import files_of_folder, files_of_pattern, kind_of
from rosd_fast.data.readers.hub import is_saved, needs_library, open_dataset, open_saved
from rosd_fast.data.readers.json import open_json
from rosd_fast.data.sources import Source
from rosd_fast.errors import UserError
from rosd_fast.quickstart import QUICKSTART


def open_rows(source: Source) -> Rows:
    """The rows of a source. Raises UserError for what cannot be read."""
    path = source.path
    if (source.split or source.config) and not (source.is_on_hub or source.is_folder):
        raise UserError(
            "only folders and data sets of the hub have a split or a config",
            where=source.text,
            fix="Leave the setting away",
        )
    if source.is_quickstart or (source.text + ":" == QUICKSTART and not path.exists()):
        return quickstart_rows(source)
    if source.is_gym:
        return GymRows(source)
    if source.is_on_hub:
        return open_dataset(source)
    if source.is_pattern:
        return open_files(files_of_pattern(source))
    if source.is_folder:
        return open_folder(source, path)
    return open_file(path)


def open_folder(source: Source, path: Path) -> Rows:
    """The rows of a folder: one of `save_to_disk`, one of the hub's layout, or just files."""
    if is_saved(path):
        return open_saved(source, path)
    if needs_library(source, path):
        return open_dataset(source, path)
    return open_files(files_of_folder(source, path), folder=path.resolve().name)


def open_files(paths: list[Path], *, folder: str = "") -> Rows:
    """The rows of several files. folder: the domain of rows that name none; empty: each file's."""
    rows = [open_file(path) for path in paths]
    return ChainedRows(rows, folder=folder, files=[str(path) for path in paths])


def open_file(path: Path) -> Rows:
    """The rows of a file, whose suffix tells how it is read; an unknown one means JSON."""
    match kind_of(path):
        case ".csv":
            return open_csv(path, delimiter=",")
        case ".tsv":
            return open_csv(path, delimiter="\t")
        case ".parquet":
            return open_parquet(path)
        case ".arrow":
            return open_arrow(path)
        case _:
            return open_json(path)


def quickstart_rows(source: Source) -> Rows:
    """The shipped problems of `quickstart:SPLIT`, as rows."""
    from rosd_fast.quickstart.tasks import SPLIT_SIZES, load_split

    for split in SPLIT_SIZES:
        if split == source.name:
            rows = [_row(asdict(problem)) for problem in load_split(split)]
            return ListRows(rows, name=source.text, folder="quickstart")
    raise UserError(
        "there is no such split", where=source.text, fix=f"Name one of {', '.join(SPLIT_SIZES)}"
    )


def _row(fields: dict[str, object]) -> dict[str, object]:
    """The fields of a shipped problem that rows may have."""
    names = ("id", "domain", "prompt", "answer", "verifier", "reference")
    return {name: fields[name] for name in names}
