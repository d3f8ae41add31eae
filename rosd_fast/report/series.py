"""Series of metrics: the steps and values of one metric, smoothed or averaged in bins."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rosd_fast.report.metrics import EVAL_TOTALS
from rosd_fast.report.stages import in_order, stage_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric over the steps that have it. Steps increase; values may be NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]  # [len(steps)]

    def __bool__(self) -> bool:
        """Return whether any value is finite."""
        return any(map(math.isfinite, self.values))

    def finite(self) -> Series:
        """Return the series without its non-finite values."""
        pairs = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Series(steps=tuple(s for s, _ in pairs), values=tuple(v for _, v in pairs))

    def smoothed(self, window: int) -> Series:
        """Return the centred moving median of `window` values, fewer at the ends, skipping NaNs.

        A moving mean would turn a single spike into a box.
        """
        half = window // 2
        values = []
        for i in range(len(self.values)):
            near = [v for v in self.values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
            values.append(median(near) if near else math.nan)
        return Series(steps=self.steps, values=tuple(values))


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Return the metric `name`; if a step has it twice (a resumed run), the later row counts."""
    by_step = {row["step"]: float(row[name]) for row in rows if name in row}
    steps = sorted(by_step)
    return Series(steps=tuple(steps), values=tuple(by_step[step] for step in steps))


def domains(rows: Sequence[Mapping[str, Any]], split: str) -> list[str]:
    """Return the domains that a split was evaluated on, sorted."""
    prefix = f"eval/{split}/"
    names = {name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)}
    return sorted(names.difference(EVAL_TOTALS))


def smoothing_window(num_values: int) -> int:
    """Return the odd window to smooth over: 1 (no smoothing) for a short series, then growing."""
    return 1 if num_values < 20 else 2 * (num_values // 30) + 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds per step of each stage. A bar is one step, or the mean of several."""

    steps: tuple[float, ...]  # [num bars], the centre of each bar
    num_steps: tuple[int, ...]  # [num bars], the number of steps per bar
    seconds: dict[str, tuple[float, ...]]  # stage -> [num bars]
    totals: dict[str, float]  # stage -> seconds over the whole run

    def __bool__(self) -> bool:
        return any(total > 0 for total in self.totals.values())


def stage_times(rows: Sequence[Mapping[str, Any]], *, max_bars: int = 120) -> StageTimes:
    """Return the time of each stage that takes any, in the order in which the stages run.

    Several rows of one step are added up. Stages that this version does not know come last. In a
    run of more than `max_bars` steps, neighbouring steps are averaged into one bar.
    """
    by_step: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        for metric, value in row.items():
            stage = stage_name(metric)
            if stage is not None and math.isfinite(value):
                by_step[row["step"]][stage] += value
    steps = [step for step in sorted(by_step) if any(by_step[step].values())]
    per_bar = max(1, math.ceil(len(steps) / max_bars))
    bars = [steps[i : i + per_bar] for i in range(0, len(steps), per_bar)]
    totals = {
        stage: sum(by_step[step][stage] for step in steps)
        for stage in in_order(name for times in by_step.values() for name in times)
    }
    shown = [stage for stage, total in totals.items() if total > 0]
    return StageTimes(
        steps=tuple((bar[0] + bar[-1]) / 2 for bar in bars),
        num_steps=tuple(len(bar) for bar in bars),
        seconds={
            stage: tuple(sum(by_step[step][stage] for step in bar) / len(bar) for bar in bars)
            for stage in shown
        },
        totals={stage: totals[stage] for stage in shown},
    )
