"""The rows of a source, whatever it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rosd_fast.data.gym import GymRows
from rosd_fast.data.readers.base import ChainedRows, ListRows, Rows
from rosd_fast.data.readers.files import files_of_folder, files_of_pattern
from rosd_fast.data.readers.json import open_json
from rosd_fast.data.sources import Source
from rosd_fast.errors import UserError


def open_rows(source: Source) -> Rows:
    """The rows of a source. Raises UserError for what cannot be read."""
    if source.is_quickstart:
        return quickstart_rows(source)
    if source.is_gym:
        return GymRows(source)
    path = Path(source.text).expanduser()
    if source.is_pattern:
        return _open_files(source, files_of_pattern(source), path.resolve().parent.name)
    if path.is_dir():
        return _open_files(source, files_of_folder(source, path), path.resolve().name)
    return open_file(path)


def open_file(path: Path) -> Rows:
    """The rows of a file, whose suffix tells how it is read; an unknown one means JSON."""
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


def _open_files(source: Source, files: list[Path], folder: str) -> Rows:
    rows = [open_file(path) for path in files]
    return ChainedRows(rows, folder=folder, files=[str(path) for path in files])
