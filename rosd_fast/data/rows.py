"""Read problems from rows of JSON; an error names the file and the line.

A row has `prompt` (or `problem` or `question`) and `answer`, and optionally `system`, `verifier`,
`domain` and `id` (or `idx`). The rows of SciKnowEval load as published: kind "mcq" means verifier
`choice`, and the domain is the name of the file's folder, since `dataset` is the same in all
domains.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, is_verifiable

PROMPT_FIELDS = ("prompt", "problem", "question")
KIND_VERIFIERS = {"mcq": "choice"}
"""The verifier of rows that name none but have a `kind`."""


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, JSON value) per line that is not blank, or per item if the file is one list."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = parse_json(text, path, fix="Close the list, or put each object on its own line")
        for number, row in enumerate(rows, start=1):
            yield f"{path}, item {number} of the list", row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = parse_json(
                line, path, first_line=number, fix="Each line must hold one whole JSON object"
            )
            yield f"{path}:{number}", row


def parse_json(text: str, path: Path, *, first_line: int = 1, fix: str) -> Any:
    """The JSON value of `text`, which begins at `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what, line = f"{error.msg}, column {error.colno}", first_line + error.lineno - 1
    except RecursionError:
        what, line = "nested too deeply", first_line
    except ValueError as error:  # an integer of thousands of digits
        what, line = str(error), first_line
    raise UserError(f"malformed JSON ({what})", where=f"{path}:{line}", fix=fix)


def read_text(path: Path) -> str:
    """The file's text without a byte order mark."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".jsonl", ".json"))
        fix = f"Give a file in it, such as {path / files[0]}" if files else "Give a .jsonl file"
        raise UserError("is a folder, not a file", where=str(path), fix=fix)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            "there is no such file",
            where=str(path),
            fix="Give a .jsonl file, or quickstart:train",
        ) from None
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", where=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError("the text is not UTF-8", where=f"{path}:{line}") from None


def parse_row(row: Any, *, where: str, folder: str, number: int, verifier: str | None) -> Problem:
    """The problem that row `number` of its data set describes."""
    if not isinstance(row, dict):
        raise UserError(
            f"is a JSON {type_name(row)}, not an object",
            where=where,
            fix='Each line must look like {"prompt": ..., "answer": ...}',
        )
    domain = text_field(row, "domain", where) or folder or "problems"
    prompt_field = next((name for name in PROMPT_FIELDS if name in row), PROMPT_FIELDS[0])
    prompt = text_field(row, prompt_field, where, required=True)
    chosen = pick_verifier(row, where, verifier)
    answer = answer_field(row, where)
    if not is_verifiable(chosen, answer):
        raise UserError(
            f"no completion can match the answer {shorten(answer)} under the verifier {chosen}",
            where=where,
            fix=f"It wants {VERIFIERS[chosen].answers}",
        )
    return Problem(
        id=id_field(row, where, domain, number),
        domain=domain,
        prompt=prompt,
        answer=answer,
        verifier=chosen,
        system=text_field(row, "system", where) or None,
        reference=text_field(row, "reference", where) or None,
    )


def pick_verifier(row: dict[str, Any], where: str, default: str | None) -> str:
    """The row's own verifier, or else `default`, or else the verifier of the row's kind."""
    named = text_field(row, "verifier", where)
    if named:
        return check_verifier(named, where=where)
    if default is not None:
        return default
    kind = row.get("kind")
    if isinstance(kind, str) and kind in KIND_VERIFIERS:
        return KIND_VERIFIERS[kind]
    what = "names no verifier"
    if isinstance(kind, str):
        what += f", and there is none for its kind {kind!r}"
    elif isinstance(row.get("answer"), list):
        what += ", and there is none for an answer that is a list"
    raise UserError(
        what,
        where=where,
        fix='Add a field "verifier" or the option --data.verifier (--verifier in data and eval): '
        f"one of {', '.join(VERIFIERS)}",
    )


def check_verifier(name: str, *, where: str) -> str:
    """`name`, if there is such a verifier. Raises UserError otherwise."""
    if name in VERIFIERS:
        return name
    near = difflib.get_close_matches(name, VERIFIERS, n=1)
    known = f"known are {', '.join(VERIFIERS)}"
    raise UserError(
        f"there is no verifier {shorten(name)}",
        where=where,
        fix=f"Did you mean {near[0]}? ({known})" if near else known.capitalize(),
    )


def text_field(row: dict[str, Any], name: str, where: str, *, required: bool = False) -> str:
    """A string field; "" when it is not required and absent, null or blank."""
    value = row.get(name)
    if value is None and required:
        raise UserError(
            f'the field "{name}" is {"null" if name in row else "missing"}', where=where
        )
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f'the field "{name}" is a JSON {type_name(value)}, not a string', where=where
        )
    if not value.strip():
        if required:
            raise UserError(f'the field "{name}" is empty', where=where)
        return ""
    return check_text(value, name, where)


def answer_field(row: dict[str, Any], where: str) -> str:
    """The answer as text: a number as Python writes it, a list as JSON."""
    value = row.get("answer")
    if isinstance(value, bool | dict):
        raise UserError(
            f'the field "answer" is a JSON {type_name(value)}, not a string or number', where=where
        )
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return json.dumps(value)
    return text_field(row, "answer", where, required=True)


def id_field(row: dict[str, Any], where: str, domain: str, number: int) -> str:
    """The row's id: a string as it is; a number, or else the row number, after the domain."""
    name = "id" if row.get("id") is not None else "idx"
    value = row.get(name)
    if value is None:
        return f"{domain}:{number}"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f'the field "{name}" is a JSON {type_name(value)}, not a string or number', where=where
        )
    if isinstance(value, int):
        return f"{domain}:{value}"
    return text_field(row, name, where, required=True)


def check_text(value: str, name: str, where: str) -> str:
    """`value`, if it can be written to a file: JSON can contain half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'the field "{name}" has half of a surrogate pair', where=where, fix="Remove it"
        ) from None
    return value


def type_name(value: Any) -> str:
    names = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names.get(type(value), "null")


def shorten(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}...")
