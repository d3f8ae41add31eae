"""Open files that hold rows, and find them in folders. A user's mistake raises UserError."""

from __future__ import annotations

import bz2
import difflib
import gzip
import lzma
import os
import re
import shutil
import stat
import tempfile
import zlib
from pathlib import Path
from typing import IO

from rosd_fast.data.sources import COMPRESSED, FILES, Source
from rosd_fast.errors import RunFailed, UserError

_ADDRESS = re.compile(r"(.*/)?[a-z0-9]{2,}:/")  # of the web, as a path: https:/host/file
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = ("train", "training", "dev", "validation", "valid", "val", "test", "testing", "eval")
"""Words in the names of files by which their split is known."""


class RowFile:
    """A file that is read in pieces. Where it changes meanwhile, the run ends.

    path: as the user named it. size: in bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._packed = path.suffix in COMPRESSED
        check_file(path)
        try:
            self.file: IO[bytes] = unpacked(path) if self._packed else path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from None
        self._state = self._now()
        self.size = self._state[0]

    def read(self, start: int, end: int) -> bytes:
        """The bytes in [start, end). Raises RunFailed when the file was changed."""
        data = os.pread(self.file.fileno(), end - start, start)
        if len(data) < end - start or self._now() != self._state:
            raise RunFailed(
                f"{self.path} was changed while it was read; put it back as it was, and resume"
            )
        return data

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self.file.fileno())
        return state.st_size, state.st_mtime_ns


def check_file(path: Path) -> None:
    """Raise UserError unless there is a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path), fix=_near(path)) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if stat.S_ISDIR(mode):
        raise UserError("is a folder, not a file", where=str(path))
    if not stat.S_ISREG(mode):
        raise UserError(
            f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file",
            where=str(path),
            fix="Rows are read in any order: write them to a .jsonl file first",
        )


def unpacked(path: Path) -> IO[bytes]:
    """A temporary file with what the compressed file holds. Raises UserError."""
    if path.suffix not in UNPACK:
        raise UserError(
            f"files with the suffix {path.suffix} are not read",
            where=str(path),
            fix=f"Unpack it first: zstd -d {path}",
        )
    target = temporary_file()
    try:
        with UNPACK[path.suffix](path, "rb") as source:
            shutil.copyfileobj(source, target, 2**20)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        raise UserError(
            f"the file is damaged ({error})", where=str(path), fix="Copy or download it again"
        ) from None
    target.flush()
    return target


def temporary_file() -> IO[bytes]:
    """A file without a name, which is gone when the process ends, however it ends."""
    return tempfile.TemporaryFile(prefix="rosd-fast-")


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that the system does not let us read, or for lack of space."""
    reason = getattr(error, "strerror", None) or str(error)
    fix = {
        "No space left on device": "Set TMPDIR to a folder with room for the unpacked file",
        "Too many open files": "Join the files to fewer, or raise the limit (ulimit -n)",
    }
    return UserError(
        f"the file cannot be read ({reason})", where=str(path), fix=fix.get(reason, "")
    )


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read, compression left aside: ".csv" for x.csv.gz."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def files_of_pattern(source: Source) -> list[Path]:
    """The files that a pattern such as data/*.parquet matches, in order. Raises UserError."""
    pattern = source.path
    anchor = Path(pattern.anchor)
    files = sorted(path for path in anchor.glob(str(pattern.relative_to(anchor))) if path.is_file())
    if not files:
        raise UserError("no file matches", where=source.text)
    return files


def files_of_folder(source: Source, folder: Path) -> list[Path]:
    """The files with rows in a folder and those below it, in order.

    Raises UserError where there is none, and where it is not plain which of them are meant.
    """
    try:
        files = [path for path in sorted(folder.rglob("*")) if _has_rows(path, folder)]
    except OSError as error:  # a folder in it is gone meanwhile
        raise unreadable(folder, error) from None
    if not files:
        raise UserError(
            "the folder has no files with rows",
            where=source.text,
            fix=f"Their names end in {', '.join(FILES)}",
        )
    files = files_of_split(source, files, folder)
    kinds = sorted({kind_of(path) for path in files})
    if len(kinds) > 1:
        raise UserError(
            f"the folder has files of several kinds: {', '.join(kinds)}",
            where=source.text,
            fix=f"Name those that you mean, as in {source.text}/*{kinds[0]}",
        )
    return files


def files_of_split(source: Source, files: list[Path], folder: Path) -> list[Path]:
    """The files of the source's split. Raises UserError for none, and for several splits."""
    splits = {path: split_of(path.relative_to(folder)) for path in files}
    known = sorted({split for split in splits.values() if split is not None})
    if source.split is not None:
        files = [path for path in files if splits[path] == source.split]
        if not files:
            raise UserError(
                f"the folder has no files of the split {source.split}",
                where=source.text,
                fix=f"It has {', '.join(known)}" if known else "Leave @split away",
            )
    elif len(known) > 1:
        raise UserError(
            f"the folder has files of several splits: {', '.join(known)}",
            where=source.text,
            fix=f"Name one, as in {source.text}@split={known[-1]}",
        )
    return files


def _has_rows(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return kind_of(path) in FILES and path.name not in METADATA and not hidden and path.is_file()


def split_of(path: Path) -> str | None:
    """The split that a file belongs to by its name, or by that of its folder."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return word
    return None


def _near(path: Path) -> str:
    """What may have been meant instead of a file that does not exist."""
    if path.is_symlink():
        return f"It is a link to {path.readlink()}, which is not there"
    if _ADDRESS.match(str(path)):
        return "Download it first, or give the id of a data set of the hub, as in openai/gsm8k"
    try:
        names = [other.name for other in path.parent.iterdir() if kind_of(other) in FILES]
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"Did you mean {path.parent / near[0]}?"
    return "Give a .jsonl file, or quickstart:train"
