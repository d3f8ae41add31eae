"""`metrics.jsonl`: one JSON object a line, {"step": 3, "loss/divergence": 0.21, ...}.

A step may have several rows (training, evaluation); no row is ever changed. JSON has no NaN, so a
value that is not finite is written as null and read back as NaN. A line is written in one go and
ends in a newline, so a killed process leaves at most one broken line, the last, which readers skip
and the next writer removes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rosd_fast.errors import UserError
from rosd_fast.files import write_atomic

if TYPE_CHECKING:
    from types import TracebackType

    from rosd_fast.rollout.select import Selection
    from rosd_fast.types import Group, Verdict

FILE_NAME = "metrics.jsonl"

EVAL_TOTALS = ("accuracy", "truncated_frac", "tokens_mean")
"""The names after `eval/{split}/` that are not domains."""

RENAMED = {
    "loss/is_weight_mean": "loss/importance_weight_mean",
    "loss/is_clipped_frac": "loss/importance_clipped_frac",
}
"""Metrics of earlier versions, and their names now."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows in order: "step" is an int, every other value a float (NaN where the file has null).

    A half-written last line is left out. Raises UserError, with the line number, when the file is
    missing or when any other line is not a row.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"there is no {path.name}", where=str(path.parent), fix="Name the folder of a run."
        ) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return [row for _, row in _complete_rows(data, path)]


def _complete_rows(data: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each complete line (without its newline) and its row."""
    lines = [(i, line) for i, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            rows.append((line, _parse_row(line)))
        except ValueError as error:  # of JSON, of UTF-8 or of _parse_row
            if number == lines[-1][0]:
                break
            raise UserError(
                f"is not a row of metrics ({error})",
                where=f"{path}:{number}",
                fix="Remove the line.",
            ) from None
    return rows


def _parse_row(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError('no object with an integer "step"')
    for name, value in row.items():
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is not a number")
    metrics = {
        RENAMED.get(name, name): math.nan if value is None else float(value)
        for name, value in row.items()
        if name != "step"
    }
    return {"step": row["step"], **metrics}


class MetricsLog:
    """The writer of one `metrics.jsonl`; opening it mends what a killed process left.

    >>> with MetricsLog(run / "metrics.jsonl") as log:
    ...     log.write(1, {"loss/divergence": 0.21, "rollout/accuracy": 0.5})
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._keep_rows(lambda row: True)
        self._file = self.path.open("ab")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row, and hand it to the operating system before returning.

        Raises ValueError for a metric named "step", and TypeError for a value that is no number.
        """
        if "step" in metrics:
            raise ValueError('a metric cannot be named "step": the row has one')
        row: dict[str, float | int | None] = {"step": int(step)}
        for name, value in metrics.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        line = json.dumps(row, allow_nan=False, separators=(", ", ": "))
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, and a half-written last line. All or nothing."""
        self._file.close()
        self._keep_rows(lambda row: row["step"] <= step)
        self._file = self.path.open("ab")

    def _keep_rows(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        old = self.path.read_bytes()
        rows = _complete_rows(old, self.path)
        new = b"".join(line + b"\n" for line, row in rows if wanted(row))
        if new != old:
            write_atomic(self.path, new)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def rollout_metrics(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    num_distilled_rollouts: int,
    selection: Selection,
    version: int,
) -> dict[str, float]:
    """The `rollout/*` metrics of a step, over all sampled rollouts, kept or dropped.

    `verdicts` is by rollout id and has one for each rollout. `version`: of the weights that learn
    from them; `policy_lag_mean` is by how much those that sampled are older. Raises ValueError when
    there is no rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        raise ValueError("there is no rollout to measure")
    total = len(rollouts)
    return {
        "rollout/accuracy": sum(verdicts[r.id].success for r in rollouts) / total,
        "rollout/tokens_mean": sum(len(r.completion_ids) for r in rollouts) / total,
        "rollout/truncated_frac": sum(r.finish_reason == "length" for r in rollouts) / total,
        "rollout/groups_kept_frac": len(selection.kept) / len(groups),
        "rollout/distilled_frac": num_distilled_rollouts / total,
        "rollout/policy_lag_mean": sum(version - r.policy_version for r in rollouts) / total,
        "rollout/num_rollouts": float(total),
    }
