"""The display of a running run: a bar on a terminal, one line per step elsewhere.

    with progress(total_steps=40, first_step=1) as shown:
        with shown.stage("sample"):
            ...
        shown.step_done(1, metrics)

The clock of the same stages gives the `time/` metrics.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rosd_fast.report.stages import STEP_TIME, Stage, stage_name

REFRESHES_PER_S = 4
RATES = {
    Stage.SAMPLE: "perf/rollout_tokens_per_s",
    Stage.LEARN: "perf/learn_tokens_per_s",
}  # stages whose tokens per second are metrics
RECENT_STEPS = 20  # the time left is estimated from these


class StageClock:
    """Seconds spent in each stage. While an inner stage runs, the clock of the outer one stops."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: defaultdict[Stage, float] = defaultdict(float)
        self._tokens: defaultdict[Stage | None, int] = defaultdict(int)
        self._open: list[Stage] = []
        self._mark = self._start = now()

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Count the time of the `with` block for `stage`.

        The value of a Stage may be given in its place; any other string raises ValueError.
        """
        self._settle()
        self._open.append(Stage(stage))
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    @property
    def current(self) -> Stage | None:
        """The stage that runs; None between stages."""
        return next(reversed(self._open), None)  # safe in the thread of the bar, too

    def tokens(self, count: int) -> None:
        """Add tokens sampled or trained on in the current stage."""
        self._tokens[self.current] += count

    def tokens_per_s(self) -> float:
        """Return the tokens of the current stage over its seconds so far.

        Changes nothing, as the bar calls it from its own thread.
        """
        stage, mark = self.current, self._mark
        if stage is None:
            return 0.0
        seconds = self._seconds.get(stage, 0.0) + self._now() - mark
        return self._tokens.get(stage, 0) / seconds if seconds > 0 else 0.0

    def pop(self) -> dict[Stage, float]:
        """Return the seconds by stage since the last call, and reset the clock."""
        self._settle()
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._tokens.clear()
        self._start = self._mark
        return seconds

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the time since the last call, and reset the clock.

        time/{stage}_s: seconds of each stage that ran.
        time/step_s: seconds in total, including the time between stages.
        perf/{rollout,learn}_tokens_per_s: where the stages sample and learn counted tokens.
        """
        self._settle()
        step_s, tokens = self._mark - self._start, dict(self._tokens)
        seconds = self.pop()
        found = {stage.metric: value for stage, value in seconds.items()}
        found[STEP_TIME] = step_s
        for stage, rate in RATES.items():
            if tokens.get(stage) and seconds.get(stage):
                found[rate] = tokens[stage] / seconds[stage]
        return found

    def _settle(self) -> None:
        """Add the time since the last mark to the current stage."""
        now = self._now()
        if self.current is not None:
            self._seconds[self.current] += now - self._mark
        self._mark = now


class Progress:
    """Plain output: one line per step. The base class of the bar."""

    def __init__(self, total_steps: int, first_step: int, console: Console) -> None:
        self.clock = StageClock()
        self.console = console
        self.total_steps = total_steps
        self.step = first_step - 1  # the last step done
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_done = time.perf_counter()
        self._stage_totals: defaultdict[str, float] = defaultdict(float)
        self._late_notes: list[str] = []
        self._summary = self._split = ""

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Show that a stage runs, and time it."""
        self._write_late_notes()
        with self.clock.stage(stage):
            yield

    def tokens(self, count: int) -> None:
        """Add tokens to the current stage."""
        self.clock.tokens(count)

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        now = time.perf_counter()
        self._durations.append(now - self._last_done)
        self._last_done = now
        self.step = step
        for metric, value in metrics.items():
            if (name := stage_name(metric)) is not None:
                self._stage_totals[name] += value
        self._summary = describe_metrics(metrics)
        self._split = describe_shares(self._stage_totals)
        self._write_late_notes()
        self._show_step(metrics)

    def note(self, text: str) -> None:
        """Write a separate line. May be called from a signal handler."""
        try:
            self._write(text)
        except RuntimeError:  # the handler interrupted another write
            self._late_notes.append(text)

    def remaining_s(self) -> float | None:
        """Return the estimated seconds until the last step is done, None before the first one."""
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        elapsed = time.perf_counter() - self._last_done
        return max(0.0, mean * (self.total_steps - self.step) - elapsed)

    def _show_step(self, metrics: Mapping[str, float]) -> None:
        parts = [f"step {self.step}/{self.total_steps}", self._summary]
        parts += _figure(metrics, STEP_TIME, "{:.1f} s")
        if (left := self.remaining_s()) is not None:
            parts.append(f"ETA {format_s(left)}")
        self._write("  ".join([*parts, self._split]).rstrip())

    def _write(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write_late_notes(self) -> None:
        while self._late_notes:
            self._write(self._late_notes.pop(0))


class Hidden:
    """A display that shows nothing: for work that runs at the same time as another stage."""

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        yield

    def tokens(self, count: int) -> None:
        """Ignore the tokens, as the tokens per second are those of the other stage."""


class BarProgress(Progress):
    """Two live lines at the bottom of a terminal.

    The first has the bar and the figures of the last step, the second the time by stage.
    """

    def __rich__(self) -> RenderableType:
        left = self.remaining_s()
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(f"step {self.step}/{self.total_steps}", "bold"),
            ProgressBar(self.total_steps, self.step, width=24),
            Text(self._summary),
            Text(f"ETA {format_s(left)}" if left is not None else "ETA -", "cyan"),
        )
        stage = Text(no_wrap=True, overflow="ellipsis")
        stage.append(self.clock.current or "...", "green")
        if rate := self.clock.tokens_per_s():
            stage.append(f"  {rate:,.0f} tokens/s")
        stage.append(f"  {self._split}", "dim")
        return Group(bar, stage)

    def _show_step(self, metrics: Mapping[str, float]) -> None:
        """Write an evaluation as a line above the live lines, which show everything else."""
        if any(name.startswith("eval/") for name in metrics):
            self._write(f"step {self.step}: {self._summary}")


@contextmanager
def progress(
    total_steps: int, first_step: int, plain: bool | None = None, console: Console | None = None
) -> Iterator[Progress]:
    """Open the display of steps `first_step` to `total_steps`.

    plain: whether to write lines in place of a bar; None: unless the output is a terminal.
    """
    console = console or Console()
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal
    if plain:
        yield Progress(total_steps, first_step, console)
        return
    shown = BarProgress(total_steps, first_step, console)
    with Live(shown, console=console, refresh_per_second=REFRESHES_PER_S, transient=True):
        yield shown


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """Return a line such as `accuracy 41.2%  loss 0.0213  1,234 tokens/s  dev 47.3%  ood 20.1%`."""
    parts = _figure(metrics, "rollout/accuracy", "accuracy {:.1%}")
    parts += _figure(metrics, "loss/divergence", "loss {:.4g}")
    # Of weighted advantages, which nearly cancel; a likelihood has none and is the loss itself.
    parts += _figure(metrics, "policy/loss", "policy loss {:.4g}")
    parts += _figure(metrics, "perf/rollout_tokens_per_s", "{:,.0f} tokens/s")
    for split in ("dev", "ood"):
        parts += _figure(metrics, f"eval/{split}/accuracy", split + " {:.1%}")
    return "  ".join(parts)


def describe_shares(seconds: Mapping[str, float]) -> str:
    """Return `sample 62%, reflect 20%, learn 18%`: largest first, without stages under 1%."""
    total = sum(seconds.values())
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{stage} {value / total:.0%}" for stage, value in shares if value >= 0.01 * total > 0
    )


def _figure(metrics: Mapping[str, float], name: str, form: str) -> list[str]:
    """Return [the formatted metric], or [] if the metric is missing or not finite."""
    value = metrics.get(name)
    return [form.format(value)] if value is not None and math.isfinite(value) else []


def format_s(seconds: float) -> str:
    """Return a duration as `0:05`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
