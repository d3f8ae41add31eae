"""`metrics.jsonl`: one JSON object per line, {"step": 3, "loss/divergence": 0.21, ...}.

A step may have several rows (training, evaluation); rows are never modified. JSON has no NaN, so a
non-finite value is written as null and read back as NaN. Each line is written at once and ends in a
newline, so a killed process leaves at most one broken line, the last one. Readers skip a broken
last line, and the next writer removes it.
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
    from rosd_fast.types import Group, TrainSample, Verdict

FILE_NAME = "metrics.jsonl"

EVAL_TOTALS = ("accuracy", "accuracy_low", "accuracy_high", "truncated_frac", "tokens_mean")
"""Metrics `eval/{split}/{name}` whose name is not a domain."""

RENAMED = {
    "loss/is_weight_mean": "loss/importance_weight_mean",
    "loss/is_clipped_frac": "loss/importance_clipped_frac",
    "rollout/answered_frac": "rollout/answer_found_frac",
}
"""Metric names of earlier versions -> current names."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows in order: "step" is an int, every other value a float (NaN for null).

    Names of earlier versions are translated (`RENAMED`). A half-written last line is skipped.
    Raises UserError if the file is missing, and with the line number if another line is not a row.
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
    """Return each complete line, without its newline, with its row."""
    lines = [(i, line) for i, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            rows.append((line, _parse_row(line)))
        except ValueError as error:  # from JSON, UTF-8 or _parse_row
            if number == lines[-1][0]:
                break
            raise UserError(
                f"is not a row of metrics ({error})",
                where=f"{path}:{number}",
                fix="Remove the line.",
            ) from None
    return rows


def _parse_row(line: bytes) -> dict[str, Any]:
    row: Any = json.loads(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError('no object with an integer "step"')
    parsed: dict[str, Any] = {"step": row.pop("step")}
    for name, value in row.items():
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is not a number")
        parsed[RENAMED.get(name, str(name))] = math.nan if value is None else float(value)
    return parsed


class MetricsLog:
    """The writer of a `metrics.jsonl`; opening it removes the broken line of a killed process.

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
        """Append a row and flush it to the operating system.

        Raises ValueError for a metric named "step", and TypeError for a value that is not a number.
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
        """Drop the rows of later steps and a half-written last line, atomically."""
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
    samples: Sequence[TrainSample],
    selection: Selection,
    version: int,
) -> dict[str, float]:
    """Return the `rollout/*` metrics of a step, over all sampled rollouts, kept or dropped.

    verdicts: the verdict of every rollout, by rollout id.
    samples: what the step trains on.
    version: the version of the weights that are trained; `policy_lag_mean` is the mean number of
        versions by which the sampling weights are older.

    Raises ValueError if there is no rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        raise ValueError("there is no rollout to measure")
    total = len(rollouts)
    distilled = {sample.rollout_id for sample in samples if sample.is_distilled}
    trained = {sample.rollout_id for sample in samples if sample.has_effect}
    found = sum(verdicts[r.id].answer is not None for r in rollouts)
    return {
        "rollout/accuracy": sum(verdicts[r.id].success for r in rollouts) / total,
        "rollout/answer_found_frac": found / total,
        "rollout/tokens_mean": sum(len(r.completion_ids) for r in rollouts) / total,
        "rollout/truncated_frac": sum(r.finish_reason == "length" for r in rollouts) / total,
        "rollout/groups_kept_frac": len(selection.kept) / len(groups),
        "rollout/distilled_frac": len(distilled) / total,
        "rollout/trained_frac": len(trained) / total,
        "rollout/policy_lag_mean": sum(version - r.policy_version for r in rollouts) / total,
        "rollout/num_rollouts": float(total),
    }
