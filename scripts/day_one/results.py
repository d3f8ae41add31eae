"""What a stage has found so far: one JSON file, replaced as a whole after every item."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rosd_fast.files import write_atomic

Row = dict[str, Any]
"""A line of a table: "table" is the table's title; "ok", where there is one, is False for a check
that failed; the other keys are the columns."""

State = Literal["running", "done", "cut", "ended", "failed", "skipped"]
STATES: dict[State, str] = {
    "running": "running",
    "done": "done",
    "cut": "cut: its time was over before its last item",
    "ended": "ended at its time limit",
    "failed": "failed",
    "skipped": "skipped: no time was left",
}


@dataclass(slots=True, kw_only=True)
class Item:
    """One measurement. error: why there is none; it is repeated when the stage runs again."""

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Result:
    """The results of a stage.

    identity: what the results depend on: source, versions, device. Others are not kept.
    left: keys of the items that were not tried.
    summary: rows made of all items.
    """

    stage: str
    identity: dict[str, str]
    state: State = "running"
    seconds: float = 0.0
    limit_s: float = 0.0
    items: dict[str, Item] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)
    error: str = ""

    @property
    def rows(self) -> list[Row]:
        """All rows, the summary's first."""
        return [*self.summary, *(row for item in self.items.values() for row in item.rows)]

    @property
    def num_failed(self) -> int:
        """Failed checks, and items without a result."""
        checks = sum(row.get("ok") is False for row in self.rows)
        return checks + sum(bool(item.error) for item in self.items.values())

    def holds_for(self, identity: Mapping[str, str]) -> bool:
        """Whether it was measured on the same source, device and versions.

        Another commit may have the same source, as where only pages changed.
        """
        return {**self.identity, "commit": ""} == {**identity, "commit": ""}

    @property
    def is_complete(self) -> bool:
        """Whether every item has a result, be it good or bad."""
        return self.state == "done" and not any(item.error for item in self.items.values())

    @property
    def is_good(self) -> bool:
        return self.state == "done" and self.num_failed == 0

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        write_atomic(path_of(folder, self.stage), text.encode())


def path_of(folder: Path, stage: str) -> Path:
    return folder / "stages" / f"{stage}.json"


def load(folder: Path, stage: str) -> Result | None:
    """The results of a stage, None where there are none that can be read."""
    try:
        found = json.loads(path_of(folder, stage).read_text())
        items = {key: Item(**item) for key, item in found.pop("items").items()}
        return Result(**found, items=items)
    except (OSError, ValueError, TypeError, KeyError):
        return None
