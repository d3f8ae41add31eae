"""What options say about where problems come from: comma-separated sources, each with settings.

    a.jsonl,b.parquet@weight=0.5@verifier=math,openai/gsm8k@config=main@split=train

A source is a file, a folder, a pattern such as data/*.parquet, the id of a data set of the Hugging
Face hub, quickstart:SPLIT or reasoning_gym:TASK. A setting counts for its source alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosd_fast.errors import UserError
from rosd_fast.quickstart import QUICKSTART
from rosd_fast.verify.user_file import absolute_verifier

GYM = "reasoning_gym:"  # prefix of the names of tasks, as in reasoning_gym:leg_counting
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of the files that hold rows."""

COLUMN_SETTINGS = ("prompt", "answer", "system", "reference", "id", "teacher_prompt", "feedback")
"""Fields whose column a source can name. Its verifier, domain and weight are values instead."""
SETTINGS = ("weight", "verifier", "domain", "split", "config", *COLUMN_SETTINGS)

_SETTING = re.compile(r"@([A-Za-z_]+)=")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where problems come from.

    >>> parse_sources("b.parquet@weight=0.5@prompt=question")[0]
    Source(text="b.parquet", weight=0.5, columns={"prompt": "question"})
    """

    text: str  # as the user wrote it, without settings
    weight: float = 1.0  # how often an epoch draws each of its problems
    verifier: str | None = None  # of rows that name none
    domain: str | None = None  # of all its rows; None: what the rows say
    split: str | None = None  # of a data set, or of the files of a folder
    config: str | None = None  # of a data set that has several
    columns: Mapping[str, str] = field(default_factory=dict)  # field -> column
    options: Mapping[str, str] = field(default_factory=dict)  # of a task of reasoning_gym

    @property
    def name(self) -> str:
        """A short name: "train" for data/train.jsonl, "gsm8k" for openai/gsm8k."""
        if self.is_quickstart or self.is_gym:
            return self.text.partition(":")[2]
        name = self.path.name
        while Path(name).suffix in (*FILES, *COMPRESSED):
            name = Path(name).stem
        return name

    @property
    def path(self) -> Path:
        """The file or folder that it names."""
        return _path(self.text)

    @property
    def is_quickstart(self) -> bool:
        return self.text.startswith(QUICKSTART)

    @property
    def is_gym(self) -> bool:
        return self.text.startswith(GYM)

    @property
    def is_on_hub(self) -> bool:
        """Whether it is the id of a data set, for lack of a file of that name."""
        if self.is_quickstart or self.is_gym or Path(self.text).suffix in (*FILES, *COMPRESSED):
            return False
        return bool(_HUB_ID.fullmatch(self.text)) and not _exists(self.text)

    @property
    def is_folder(self) -> bool:
        return _exists(self.text) and self.path.is_dir()

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for all files that match it."""
        return bool(_PATTERN.search(self.text)) and not _exists(self.text)


def parse_sources(
    text: str, *, verifier: str | None = None, columns: Mapping[str, str | None] | None = None
) -> tuple[Source, ...]:
    """The sources that an option such as data.train names.

    verifier: of sources that name none. columns: the column of each field, as in data.columns.
    Raises UserError for a setting that does not exist or has no such value.
    """
    given = {name: column for name, column in (columns or {}).items() if column is not None}
    sources = [parse_source(part, verifier=verifier, columns=given) for part in split_sources(text)]
    for number, source in enumerate(sources):
        if source in sources[:number]:
            raise UserError(
                f"{source.text} is named twice", where=text, fix="Give it a weight, as in @weight=2"
            )
    return tuple(sources)


def parse_source(text: str, *, verifier: str | None, columns: Mapping[str, str]) -> Source:
    """The source that one part of the text stands for."""
    place, settings = split_settings(text)
    if not place:
        raise UserError("a source is empty", where=text or ",", fix="Name a file before the @")
    values: dict[str, Any] = {"verifier": verifier}
    own, options, is_gym = dict(columns), {}, place.startswith(GYM)
    for number, (name, value) in enumerate(settings):
        if any(name == other for other, _ in settings[:number]):
            raise UserError(f"the setting {name} is given twice", where=text, fix="Leave one")
        if name not in SETTINGS and not is_gym:
            raise UserError(f"there is no setting {name}", where=text, fix=_nearest(name))
        if not value:
            raise UserError(f"the setting {name} has no value", where=text)
        if name in COLUMN_SETTINGS and not is_gym:
            own[name] = value
        elif name not in SETTINGS or name in COLUMN_SETTINGS:
            options[name] = value
        else:
            values[name] = _weight(value, text) if name == "weight" else value
    return Source(text=place, columns={} if is_gym else own, options=options, **values)


def split_sources(text: str) -> list[str]:
    """The parts of a comma-separated list; the path of a file that exists is one part."""
    return [text] if _exists(text) else [part.strip() for part in text.split(",")]


def split_settings(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The place that a source names, and its settings in order."""
    if _exists(text):
        return text, []
    place, *rest = _SETTING.split(text)
    return place.strip(), [(n, v.strip()) for n, v in zip(rest[::2], rest[1::2], strict=True)]


def is_share(text: str) -> bool:
    """Whether the text is a share of the training problems, such as 10%, and not a source."""
    return text.rstrip().endswith("%") and not _exists(text)


def absolute_sources(text: str) -> str:
    """The same sources with absolute paths of files; hub ids and built-in names stay."""
    return text if is_share(text) else ",".join(map(_absolute_source, split_sources(text)))


def _absolute_source(text: str) -> str:
    place, settings = split_settings(text)
    source = Source(text=place)
    if place and not (source.is_quickstart or source.is_gym or source.is_on_hub):
        place = str(_path(place).absolute())
    values = [
        (name, absolute_verifier(value) if name == "verifier" else value)
        for name, value in settings
    ]
    return place + "".join(f"@{name}={value}" for name, value in values)


def _weight(value: str, where: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not 0.0 < weight <= 1000.0:
        raise UserError(
            f"the weight is {value!r}, must be a number above 0 and at most 1000",
            where=where,
            fix="@weight=2 draws each problem twice per epoch, @weight=0.5 every other problem",
        )
    return weight


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    known = f"known are {', '.join(SETTINGS)}"
    return f"Did you mean {near[0]}? ({known})" if near else known.capitalize()


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def _exists(text: str) -> bool:
    """Whether there is a file or folder of that name."""
    try:
        return bool(text) and _path(text).exists()
    except (OSError, ValueError):  # too long a name, a null byte
        return False
