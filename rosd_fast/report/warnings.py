"""Signs of collapse in the metrics of a run, each in one line of text.

The signs are functions of the rows alone, so `rosd-fast report` finds in `metrics.jsonl` what the
run has shown. A sign needs `PATIENCE` training steps in a row, except for the gap between engine
and trainer, where one step is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Rows = Sequence[Mapping[str, Any]]

PATIENCE = 3  # training steps
MIN_GRAD_NORM = 1e-5
MIN_ENTROPY = 0.005  # nats / token
MAX_LOGPROB_GAP = 0.1  # nats / token
TRUNCATED_RISE = 0.1  # share of the rollouts
SHORTENED = 0.5  # of the length of the first rollouts
ENTROPIES = ("loss/student_entropy", "policy/entropy_mean")
GAPS = ("loss/logprob_gap_mean", "policy/logprob_gap_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A sign of collapse: its name, the first step that showed it, and what to do about it."""

    cause: str
    step: int
    text: str


def warnings(rows: Rows) -> list[Warned]:
    """Return each cause once, at the first step that shows it, in the order of the steps."""
    watch = Watch()
    return [found for row in rows for found in watch.add(row)]


class Watch:
    """Reads the rows of a run one by one, and names each cause the first time that it shows."""

    def __init__(self, rows: Rows = ()) -> None:
        """Start after `rows`, whose causes have been named."""
        self._training: list[Mapping[str, Any]] = []
        self._seen: set[str] = set()
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> list[Warned]:
        """Return the causes that this row, with those before it, is the first to show."""
        if not _is_training(row):
            return []
        self._training.append(row)
        found = []
        for cause, sign in SIGNS.items():
            if cause not in self._seen and (text := sign(self._training)) is not None:
                self._seen.add(cause)
                found.append(Warned(cause=cause, step=row["step"], text=text))
        return found


def _is_training(row: Mapping[str, Any]) -> bool:
    """Whether the row is of a step that trained something; an update may have been skipped."""
    names = ("loss/num_distilled_tokens", "loss/num_policy_tokens")
    return sum(row.get(name, 0.0) for name in names) > 0


def _gradient(rows: Rows) -> str | None:
    norms = _last(rows, "loss/grad_norm")
    if not norms or max(norms) >= MIN_GRAD_NORM:
        return None
    return (
        f"the gradient norm has been below {MIN_GRAD_NORM:g} for {PATIENCE} steps (now "
        f"{norms[-1]:.2g}): almost nothing is learned. Is the teacher told anything that the "
        "student does not know, and do rollouts differ in their scores?"
    )


def _entropy(rows: Rows) -> str | None:
    for name in ENTROPIES:
        values = _last(rows, name)
        if values and max(values) < MIN_ENTROPY:
            return (
                f"the student's entropy has been below {MIN_ENTROPY:g} nats per token for "
                f"{PATIENCE} steps (now {values[-1]:.2g}): rollouts hardly differ any more. Lower "
                "optim.lr, or stop here if the accuracy no longer rises"
            )
    return None


def _truncated(rows: Rows) -> str | None:
    first, last = _ends(rows, "rollout/truncated_frac")
    if not last - first > TRUNCATED_RISE:
        return None
    return (
        f"{last:.0%} of the rollouts reach sample.max_new_tokens, and {first:.0%} did at first: "
        "the model rambles or repeats itself. Read some in rollouts/, and raise "
        "sample.max_new_tokens or lower optim.lr"
    )


def _shortened(rows: Rows) -> str | None:
    first, last = _ends(rows, "rollout/tokens_mean")
    if not last < SHORTENED * first:
        return None
    return (
        f"rollouts have shrunk from {first:.0f} to {last:.0f} tokens: the model may have stopped "
        "reasoning. Read some in rollouts/, and compare the accuracy out of domain"
    )


def _gap(rows: Rows) -> str | None:
    gap = max((rows[-1].get(name, 0.0) for name in GAPS), default=0.0)
    if not gap > MAX_LOGPROB_GAP:
        return None
    return (
        f"log-probabilities of the rollouts differ from the trainer's by {gap:.2g} nats per token: "
        "importance weights and ratios are wrong. Compare the engine's and the trainer's dtype, "
        "sample.top_p and sample.top_k; diagnose.max_logprob_gap ends a run that has such a gap"
    )


Sign = Callable[[Rows], str | None]
SIGNS: Mapping[str, Sign] = {
    "gradient": _gradient,
    "entropy": _entropy,
    "truncated": _truncated,
    "shortened": _shortened,
    "logprob gap": _gap,
}
"""The name of each cause, and the text that describes it where the last row shows it."""


def _last(rows: Rows, name: str) -> list[float]:
    """Return the metric in the last `PATIENCE` rows; [] where any of them lacks it."""
    values = [row.get(name, math.nan) for row in rows[-PATIENCE:]]
    complete = len(values) == PATIENCE and all(map(math.isfinite, values))
    return values if complete else []


def _ends(rows: Rows, name: str) -> tuple[float, float]:
    """Return the mean over the first and over the last `PATIENCE` rows; NaNs if they overlap."""
    first, last = _last(rows[:PATIENCE], name), _last(rows, name)
    if not first or not last or len(rows) < 2 * PATIENCE:
        return math.nan, math.nan
    return fmean(first), fmean(last)
