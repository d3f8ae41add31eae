"""The folder of an evaluation, written so that a killed evaluation goes on where it was.

FOLDER/  settings.json      how it was made: what it must agree in to go on
         completions.jsonl  every completion, a problem's together, in the order they came
         result.json  table.md  accuracy.png
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from rosd_fast.errors import UserError
from rosd_fast.evaluation.records import Completion, completion_from
from rosd_fast.evaluation.settings import FORMAT, changed
from rosd_fast.files import write_atomic
from rosd_fast.run_lock import LOCK_FILE, RunLock

SETTINGS, COMPLETIONS = "settings.json", "completions.jsonl"
RESULT, TABLE, PICTURE = "result.json", "table.md", "accuracy.png"
FREE_SPACE = "Free some space or make it writable, and go on with --resume"


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is that of an evaluation."""
    with suppress(OSError):  # a name that is too long
        return (folder / SETTINGS).is_file()
    return False


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of settings.json. Raises UserError when there is none or it is damaged."""
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"the folder holds no {SETTINGS}, so it is not an evaluation",
            where=str(folder),
            fix="Give a folder that rosd-fast eval has made",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=str(file)) from None
    if not _is_complete(settings):
        raise UserError(
            "holds no settings of an evaluation, or those of another version",
            where=str(file),
            fix="Start another evaluation with another --name",
        )
    return settings


def _is_complete(settings: Any) -> bool:
    """Whether settings.json has all parts that are read again."""
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        return False
    identity, model = settings.get("identity"), settings.get("model")
    return (
        isinstance(identity, dict)
        and isinstance(settings.get("options"), dict)
        and isinstance(model, dict)
        and isinstance(model.get("name"), str)
        and {"model", "data", "sampling", "chat", "dtype", "engine"} <= identity.keys()
        and all(isinstance(identity[part], dict) for part in ("data", "sampling"))
        and {"samples", "temperature"} <= identity["sampling"].keys()
    )


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError for a folder of another evaluation, naming a setting, or of other files."""
    if is_evaluation(folder):
        difference = changed(read_settings(folder)["identity"], settings["identity"])
        if difference is not None:
            raise UserError(
                f"the evaluation in it was made with other settings: {difference}",
                where=str(folder),
                fix="Choose another --name",
            )
        return
    with suppress(OSError):  # what cannot be read cannot be written either, which `begin` says
        if folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
            raise UserError(
                "exists already and is no evaluation",
                where=str(folder),
                fix="Choose another --name",
            )


def _is_foreign(path: Path) -> bool:
    """Whether a file is not one that a new evaluation has before its settings are written."""
    return path.name != LOCK_FILE and not path.name.startswith(f".{SETTINGS}.")


def begin(folder: Path, settings: Mapping[str, Any], lock: RunLock) -> None:
    """Make the folder and lock it, or go on in it.

    Raises UserError as `check_folder` does, when another process works on it, and when it cannot be
    written.
    """
    check_folder(folder, settings)
    with writing(folder, fix="Choose another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
    lock.take(folder, what="evaluation")
    check_folder(folder, settings)  # of another process, meanwhile
    if not is_evaluation(folder):
        with writing(folder, fix="Choose another folder with --out"):
            write_atomic(folder / SETTINGS, json_bytes(settings))


@contextmanager
def writing(folder: Path, *, fix: str = FREE_SPACE) -> Iterator[None]:
    """Raise UserError where the block cannot write a file of the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the evaluation's folder cannot be written ({error.strerror})",
            where=str(folder),
            fix=fix,
        ) from None


def read_completions(folder: Path, *, samples: int | None = None) -> list[Completion]:
    """The completions of all problems that have `samples` of them, in the file's order.

    The others were being written when a process was killed. samples: None: the most that one has.
    Raises UserError for a line, other than the last, that is not a completion, and for a file that
    cannot be read.
    """
    file = folder / COMPLETIONS
    lines: list[bytes] = []
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(file)) from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(completion_from(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # half-written
                break
            raise UserError(
                f"is not a completion ({error})", where=f"{file}:{number}", fix="Remove the line"
            ) from None
    indices: dict[tuple[str, str], list[int]] = {}
    for completion in found:
        indices.setdefault(completion.key, []).append(completion.index)
    whole = [*range(samples or max(map(len, indices.values()), default=0))]
    complete = {key for key, own in indices.items() if sorted(own) == whole}
    return [completion for completion in found if completion.key in complete]


class CompletionsLog:
    """The writer of completions.jsonl; opening it removes what is not in `kept`."""

    def __init__(self, folder: Path, kept: Sequence[Completion]) -> None:
        file = folder / COMPLETIONS
        text = b"".join(map(line_of, kept))
        with writing(folder):
            if not file.exists() or file.read_bytes() != text:
                write_atomic(file, text)
            self._file: BinaryIO = file.open("ab", buffering=0)

    def write(self, completions: Sequence[Completion]) -> None:
        """Append the completions of a problem and hand them to the operating system.

        Raises UserError when the disk is full.
        """
        left = memoryview(b"".join(map(line_of, completions)))
        with writing(Path(self._file.name).parent):
            while left:
                left = left[self._file.write(left) :]

    def close(self) -> None:
        self._file.close()


def line_of(completion: Completion) -> bytes:
    """A line of completions.jsonl. Lone surrogates stay escaped, as JSON in UTF-8 needs."""
    return json.dumps(asdict(completion)).encode() + b"\n"


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n"
