"""Write a `Config` as TOML that reads back as an equal one, and find the lines of options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rosd_fast.config import Config

HEADER = "# Every option of a rosd-fast run. `false` stands for none where an option can be none.\n"


def to_toml(config: Config) -> str:
    """The TOML text with every option, in the order of definition."""
    return HEADER + _table(config, "")


def is_dump(path: Path) -> bool:
    """Whether `path` is a run folder, or a file with every option as `to_toml` writes it."""
    return path.is_dir() or path.read_text("utf-8").startswith(HEADER)


def _table(section: BaseModel, name: str) -> str:
    """The options of a section, each on a line, and after them the tables of its sections."""
    lines, tables = [], []
    for key, value in section:
        if isinstance(value, BaseModel):
            inner = f"{name}.{key}" if name else key
            tables.append(f"\n[{inner}]\n{_table(value, inner)}")
        else:
            lines.append(f"{key} = {_value(value)}\n")
    return "".join(lines + tables)


def _value(value: Any) -> str:
    if value is None:
        return "false"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        return _string(value)
    return repr(value)


def _string(text: str) -> str:
    """A TOML string, multi-line if the text has several lines."""
    if "\n" not in text:
        return _escape(text)
    # TOML drops a line break right after the opening quotes.
    lines = [_escape(line)[1:-1] for line in text.split("\n")]
    return '"""\n' + "\n".join(lines) + '"""'


def _escape(text: str) -> str:
    """`text` in quotes. TOML's escapes are JSON's, except that DEL must be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def find_line(text: str, keys: tuple[str, ...]) -> int:
    """The line where a TOML text sets the option `keys` or opens that table; 1 if there is none."""
    table: tuple[str, ...] = ()
    quotes = None  # those of the multi-line string that the line is in
    for number, line in enumerate(text.split("\n"), start=1):
        if quotes is None:
            if header := re.match(r"\s*\[([^\[\]]+)\]", line):
                table = split_key(header[1])
                if table == keys:
                    return number
            elif key := re.match(r"""\s*([\w."' -]+?)\s*=""", line):
                path = (*table, *split_key(key[1]))
                if path == keys[: len(path)]:
                    return number
        for mark in ('"""', "'''"):
            if quotes in (None, mark) and line.count(mark) % 2:
                quotes = mark if quotes is None else None
    return 1


def split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
