"""A verifier in a user's own file, named `FILE.py:FUNCTION`.

The file is loaded in worker processes only, with the user's rights, never in the trainer. It may
say more about the verifier, in constants or as attributes of the function (`score.instruction`):

    INSTRUCTION  the sentence that tells a model how to answer
    ANSWERS      the right answers that it can match, as an error message names them
    EXAMPLE      a completion that is right, with {answer} for the answer, or a function of it; each
                 problem's answer is then checked before the run starts
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rosd_fast.errors import UserError
from rosd_fast.verify.origin import Origin
from rosd_fast.verify.protocol import Description
from rosd_fast.verify.registry import VERIFIERS, Verifier, add_verifier
from rosd_fast.verify.tags import TAG_MARKS

Example = str | Callable[[str], Any] | None

_NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*(\.[^\W\d]\w*)*)", re.DOTALL)


def is_user_file(name: str) -> bool:
    """Whether a verifier's name says file and function."""
    return _NAME.fullmatch(name) is not None


def absolute_verifier(name: str | None) -> str | None:
    """The name with the file's absolute path; any other verifier keeps its name."""
    match = None if name is None else _NAME.fullmatch(name)
    if match is None:
        return name
    return f"{Path(match['file']).expanduser().absolute()}:{match['function']}"


def user_origin(name: str, *, where: str = "") -> Origin:
    """The address that the name says. Raises UserError when there is no such file."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not FILE.py:FUNCTION")
    path = Path(match["file"]).expanduser().absolute()
    if not path.is_file():
        what = "is not a file" if path.exists() else "there is no such file"
        raise UserError(f"{what}: {path}", where=where or f"the verifier {name}")
    return Origin(file=str(path), function=match["function"])


def add_user_verifier(name: str, origin: Origin, description: Description) -> Verifier:
    """Add the verifier of a user's file to `VERIFIERS`; calling it here raises ValueError."""

    def only_in_workers(completion: str, answer: str) -> Any:
        raise ValueError(f"{name} runs in worker processes only")

    instruction = description.instruction
    marks = tuple(mark for mark in TAG_MARKS if mark in instruction)
    if name not in VERIFIERS:
        add_verifier(
            Verifier(
                name=name,
                function=only_in_workers,
                answers=description.answers or "an answer that its example is right for",
                example=description.example,
                instruction=instruction,
                marks=marks or ((instruction,) if instruction else ()),
                origin=origin,
                accepts=None if description.has_example else any_answer,
            )
        )
    return VERIFIERS[name]


def any_answer(answer: str) -> bool:
    """Nothing is known to be wrong with an answer, as the file gives no example."""
    return True


def description_of(function: Callable[..., Any], module: ModuleType, origin: Origin) -> Description:
    """What the file says. Raises UserError for a constant of another type, and for a function that
    cannot be called with completion and right answer."""
    check_call(function, origin)
    texts: dict[str, str] = {}
    for field in ("answers", "instruction"):
        value = _about(function, module, field)
        if not isinstance(value, str | None):
            raise UserError(
                f"{field.upper()} is a {type(value).__name__}, not text", where=origin.file
            )
        texts[field] = value or ""
    example = example_of(function, module)
    if example is None and (value := _about(function, module, "example")) is not None:
        raise UserError(
            f"EXAMPLE is a {type(value).__name__}, neither text nor a function", where=origin.file
        )
    texts["example"] = example if isinstance(example, str) else ""
    return Description(**texts, has_example=example is not None)


def check_call(function: Callable[..., Any], origin: Origin) -> None:
    """Raise UserError for a function of other arguments, and for one that returns no score but what
    must be waited for."""
    fix = "Write it as in: def score(completion, answer): return 1.0"
    where = f"{origin.file}:{origin.function}"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError("is an async function, which returns no score", where=where, fix=fix)
    try:
        inspect.signature(function).bind("completion", "answer")
    except TypeError as error:
        raise UserError(
            f"cannot be called with completion and right answer ({error})", where=where, fix=fix
        ) from None
    except ValueError:  # a function in C that does not say what it takes
        return


def example_of(function: Callable[..., Any], module: ModuleType) -> Example:
    """The example that the function or its file gives, None: none."""
    value: Any = _about(function, module, "example")
    return value if isinstance(value, str) or callable(value) else None


def _about(function: Callable[..., Any], module: ModuleType, field: str) -> Any:
    """The function's attribute, or else the file's constant of that name."""
    return getattr(function, field, getattr(module, field.upper(), None))
