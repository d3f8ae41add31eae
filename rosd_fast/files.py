"""Atomic writes: a reader, or a restart after a crash, never sees half a file or folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
STEP_NAME = re.compile(r"step_(\d{6,})")  # of the folder of a checkpoint
STATE_JSON = "trainer_state.json"  # in it; written last
RUN_CONFIG = "config.toml"  # every option of a run, in its folder


def write_atomic(path: Path, data: bytes) -> Path:
    """Write `data` to a file beside `path`, fsync it and rename it to `path`; returns `path`.

    A missing folder is created. On an error the old file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only when something above failed
    return path


@contextmanager
def atomic_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on leaving it is fsynced and renamed to `path`.

    durable: False leaves out the fsync, for files that need not outlive a crash of the machine.
    An older `path` is replaced. On any error the new folder is removed and `path` stays as it was.
    Raises OSError when the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~current_umask())  # mkdtemp's 0o700 would hide a shared run
        yield temporary
        if durable:
            for entry in (*temporary.rglob("*"), temporary):
                fsync(entry)
        remove_folder(path)
        temporary.rename(path)
        if durable:
            fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # still there only when something above failed


def remove_folder(path: Path) -> None:
    """Delete `path` if it exists; a crash meanwhile leaves no partial folder of that name."""
    if path.exists():
        doomed = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent)) / path.name
        path.rename(doomed)
        shutil.rmtree(doomed.parent)


def remove_leftovers(parent: Path) -> None:
    """Delete temporary folders that a killed process left behind."""
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def current_umask() -> int:
    """The process's umask; reading it sets it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
