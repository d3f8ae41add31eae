"""The folder of an evaluation, written so that a killed evaluation goes on where it was.

FOLDER/  settings.json      how it was made: what it must agree in to go on
         completions.jsonl  every completion, a problem's together, in the order they came
         result.json  table.md  accuracy.png
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from rosd_fast.errors import UserError
from rosd_fast.evaluation.records import Completion
from rosd_fast.evaluation.settings import changed
from rosd_fast.files import write_atomic

SETTINGS, COMPLETIONS = "settings.json", "completions.jsonl"
RESULT, TABLE, PICTURE = "result.json", "table.md", "accuracy.png"


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is that of an evaluation."""
    return (folder / SETTINGS).is_file()


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
    if not isinstance(settings, dict) or not isinstance(settings.get("identity"), dict):
        raise UserError("holds no settings of an evaluation", where=str(file))
    return settings


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or check that the evaluation in it was begun with the same settings.

    Raises UserError if it was begun with others, naming one, and if it cannot be written.
    """
    if is_evaluation(folder):
        difference = changed(read_settings(folder)["identity"], settings["identity"])
        if difference is not None:
            raise UserError(
                f"the evaluation in it was made with other settings: {difference}",
                where=str(folder),
                fix="Choose another --name",
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            "exists already and is no evaluation", where=str(folder), fix="Choose another --name"
        )
    try:
        write_atomic(folder / SETTINGS, json_bytes(settings))
    except OSError as error:
        raise UserError(
            f"the folder cannot be written ({error.strerror})",
            where=str(folder),
            fix="Choose another folder with --out",
        ) from None


def read_completions(folder: Path, *, samples: int | None = None) -> list[Completion]:
    """The completions of all problems that have `samples` of them, in the file's order.

    The others were being written when a process was killed. samples: None: the most that one has.
    Raises UserError for a line, other than the last, that is not a completion.
    """
    file = folder / COMPLETIONS
    lines: list[bytes] = []
    with suppress(FileNotFoundError):
        lines = file.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Completion(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # half-written
                break
            raise UserError(
                f"is not a completion ({error})", where=f"{file}:{number}", fix="Remove the line"
            ) from None
    counts = Counter(completion.key for completion in found)
    whole = samples or max(counts.values(), default=0)
    return [completion for completion in found if counts[completion.key] == whole]


class CompletionsLog:
    """The writer of completions.jsonl; opening it removes what is not in `kept`."""

    def __init__(self, folder: Path, kept: Sequence[Completion]) -> None:
        file = folder / COMPLETIONS
        text = b"".join(map(line_of, kept))
        if not file.exists() or file.read_bytes() != text:
            write_atomic(file, text)
        self._file: BinaryIO = file.open("ab")

    def write(self, completions: Sequence[Completion]) -> None:
        """Append the completions of a problem and hand them to the operating system.

        Raises UserError when the disk is full.
        """
        try:
            self._file.write(b"".join(map(line_of, completions)))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror})",
                where=self._file.name,
                fix="Free some space, and go on with --resume",
            ) from None

    def close(self) -> None:
        self._file.close()


def line_of(completion: Completion) -> bytes:
    """A line of completions.jsonl. Lone surrogates stay escaped, as JSON in UTF-8 needs."""
    return json.dumps(asdict(completion)).encode() + b"\n"


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n"
