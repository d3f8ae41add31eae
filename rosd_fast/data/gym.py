"""Exercises of the package reasoning_gym as rows: `reasoning_gym:TASK@size=1000@seed=0`.

A task makes exercises by rule, each from `seed` plus its number, when it is asked for: nothing is
downloaded or kept. So the seeds of two splits must lie at least `size` apart.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from rosd_fast.data.readers.base import Rows
from rosd_fast.data.sources import GYM, Source
from rosd_fast.errors import UserError

DEFAULTS = {"size": 1000, "seed": 0}
EXAMPLES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
"""Tasks whose exercises have no answer -> the part of their metadata that has a right one."""
KEPT = 128  # exercises that stay in memory: the first ones are asked for twice
MAX_NAMED = 20  # options of a task that an error names


class GymRows(Rows):
    """The exercises of a task: `question`, `answer`, and the `metadata` that its scorer needs."""

    def __init__(self, source: Source) -> None:
        """Raises UserError for a task or an option that does not exist."""
        self._text, self._task = source.text, source.name
        self._exercises = open_task(source)
        self.folder = source.name
        self._make = lru_cache(KEPT)(self._make_one)
        self[0]  # a task without right answers is refused here

    def __len__(self) -> int:
        return len(self._exercises)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):  # the task would make any number of them
            raise IndexError(index)
        return self._make(index)

    def _make_one(self, index: int) -> dict[str, Any]:
        try:
            exercise = self._exercises[index]
        except Exception as error:
            raise UserError(
                f"the task cannot make it ({error})",
                where=self.where(index),
                fix="Change the options of the task, or set data.bad_rows=skip",
            ) from error
        return with_answer(self._task, exercise, self._text)

    def where(self, index: int) -> str:
        return f"{self._text}, exercise {index + 1}"


def with_answer(task: str, exercise: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The exercise as a JSON value with a right answer; tuples are marked.

    Raises UserError for a task that has no right answers: nothing can be shown to a teacher.
    """
    answer = exercise["answer"]
    if answer is None and task in EXAMPLES:
        answer = exercise["metadata"].get(EXAMPLES[task])
    if answer is None:
        what = "its exercises come without a right answer"
        raise UserError(what, where=where, fix="Name another task")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return mark_tuples({**exercise, "answer": text})


def mark_tuples(value: Any) -> Any:
    """`value` with each tuple as {"__tuple__": [...]}: some scorers compare them, and JSON makes
    lists of them."""
    if isinstance(value, tuple):
        return {"__tuple__": [mark_tuples(each) for each in value]}
    if isinstance(value, list):
        return [mark_tuples(each) for each in value]
    if isinstance(value, dict):
        return {key: mark_tuples(each) for key, each in value.items()}
    return value


def open_task(source: Source) -> Any:
    """The exercises of the task that a source names, by index. Raises UserError."""
    tasks = load_tasks(source.text)
    if source.name not in tasks:
        names = sorted(tasks)
        near = difflib.get_close_matches(source.name, names, n=3)
        nearest = f"Did you mean {' or '.join(near)}? ({GYM} alone lists all tasks)"
        raise UserError(
            f"reasoning_gym has no task {source.name!r}" if source.name else "names no task",
            where=source.text,
            fix=nearest if near else f"Tasks are {', '.join(names)}",
        )
    task_type, config_type = tasks[source.name]
    options = read_options(config_type, source)
    try:
        config = config_type(**options)
        config.validate()
        return task_type(config=config)
    except Exception as error:  # of any kind: each task checks its options in its own way
        raise UserError(
            f"the task refuses its options ({error or type(error).__name__})",
            where=source.text,
            fix=f"Its options are {known_options(config_type)}",
        ) from error


def load_tasks(where: str) -> Mapping[str, tuple[Any, Any]]:
    """The tasks by name, and each one's options. Raises UserError where the package is missing."""
    try:
        import reasoning_gym  # noqa: F401  # it registers its tasks
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"the package reasoning_gym cannot be imported ({error})",
            where=where,
            fix='Install it: pip install "rosd-fast[gym]"',
        ) from error
    return DATASETS


def read_options(config_type: Any, source: Source) -> dict[str, Any]:
    """The task's options as values of its own types. Raises UserError for an unknown one."""
    types = typing.get_type_hints(config_type)
    options: dict[str, Any] = {}
    for name, text in (DEFAULTS | dict(source.options)).items():
        if name not in {field.name for field in fields(config_type)}:
            near = difflib.get_close_matches(name, types, n=1)
            raise UserError(
                f"the task has no option {name}",
                where=source.text,
                fix=(f"Did you mean {near[0]}? " if near else "")
                + f"Its options are {known_options(config_type)}",
            )
        options[name] = read_option(types[name], name, text, source.text)
    if options["size"] < 1:
        raise UserError("size is below 1", where=source.text, fix="Give the number of exercises")
    return options


def read_option(kind: Any, name: str, text: Any, where: str) -> Any:
    """A value of the type `kind`; the items of a list are separated by semicolons."""
    origins = [typing.get_origin(each) or each for each in (kind, *typing.get_args(kind))]
    is_list = any(isinstance(o, type) and o is not str and issubclass(o, Sequence) for o in origins)
    try:
        return TypeAdapter(kind).validate_python(text.split(";") if is_list else text)
    except (ValidationError, PydanticUserError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is no text"
        raise UserError(
            f"the option {name} is {text!r} ({why})",
            where=where,
            fix="Write a list as a;b;c" if is_list else "Correct it",
        ) from error


def known_options(config_type: Any) -> str:
    """The names of a task's options with their defaults."""
    names = []
    for field in fields(config_type):
        default = DEFAULTS.get(field.name, field.default)
        names.append(field.name if default is MISSING else f"{field.name}={default}")
    return ", ".join(names[:MAX_NAMED])
