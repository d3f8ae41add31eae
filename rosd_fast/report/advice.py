"""A run with nothing to learn from: what was seen in its last steps, and what would help."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

TRUNCATED = 0.5  # from this share of truncated rollouts on, their length is named as a cause
MISSED = 0.5  # likewise for quotes that are not found, and for explanations that are refused


class LearningWatch:
    """Watches the metrics of a run's steps, and says once when there is nothing to learn from.

    after: number of steps in a row, `select.warn_after_steps`; 0: never.
    rows: those that the run has written before, where it is resumed.
    """

    def __init__(self, after: int, rows: Iterable[Row] = ()) -> None:
        self._after = after
        self._last: deque[Row] = deque((row for row in rows if _is_step(row)), maxlen=after)
        self._said = False

    def see(self, row: Row) -> str | None:
        """Return what to tell the user after the step of `row`, or None.

        The text comes once, and again when the run has learned something in between.
        """
        if not _is_step(row):
            return None
        self._last.append(row)
        if self._after == 0 or len(self._last) < self._after:
            return None
        text = advice(tuple(self._last))
        new, self._said = not self._said, text is not None
        return text if new else None


def _is_step(row: Row) -> bool:
    """Whether the row is that of a training step, not of an evaluation alone."""
    return "rollout/trained_frac" in row


def advice(rows: Sequence[Row]) -> str | None:
    """Return what was seen in the steps of `rows` and what would help, as one line.

    None where a rollout was trained on and an answer was found.
    """
    trained = any(row["rollout/trained_frac"] for row in rows)
    unanswered = not any(
        row.get("rollout/answered_frac", 1) or row["rollout/accuracy"] for row in rows
    )
    if trained and not unanswered:
        return None
    what = "no answer was found" if trained else "nothing to learn from"
    steps = "the last step" if len(rows) == 1 else f"the last {len(rows)} steps"
    causes = list(_causes(rows, unanswered=unanswered))
    if not causes:
        causes = [("no rollout gave a sample", "see the metrics select/* and reflect/*")]
    return f"{what} in {steps}: " + "; ".join(f"{seen}: {fix}" for seen, fix in causes)


def _causes(rows: Sequence[Row], *, unanswered: bool) -> Iterator[tuple[str, str]]:
    """Yield (what was seen, what would help)."""
    if unanswered:
        yield (
            "the verifier found no answer in any rollout",
            "say in each problem's prompt how to answer, as in <answer>...</answer>",
        )
    if (share := _mean(rows, "rollout/truncated_frac")) >= TRUNCATED:
        yield (
            f"{share:.0%} of the rollouts reach sample.max_new_tokens",
            "raise it, or ask for shorter answers",
        )
    yield from _group_causes(rows)
    if _sum(rows, "reflect/num_reflections"):
        yield from _reflection_causes(rows)


def _group_causes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield the causes that are in the scores of the groups."""
    groups, hopeless = _sum(rows, "select/num_groups"), _sum(rows, "select/num_no_success")
    if not groups:
        return
    right = _sum(rows, "select/num_all_correct")
    if hopeless == groups:
        fix = "take easier problems, or raise sample.group_size"
        if _sum(rows, "select/num_dropped_no_reference"):
            fix += ', or give the problems a "reference"'
        elif _sum(rows, "select/num_dropped_no_success"):
            fix += ", or set select.on_no_success to reference or answer"
        yield "no rollout is right", fix
    elif right == groups:
        yield "every rollout is right", "take harder problems, or raise sample.temperature"
    elif hopeless + right == groups:
        yield (
            f"{hopeless:.0f} of {groups:.0f} groups are all wrong and the others all right",
            "take problems between the two, or raise sample.group_size or sample.temperature",
        )
    if missing := _sum(rows, "select/num_no_demonstration"):
        yield (
            f"{missing:.0f} rollouts have no correct sibling to show the teacher",
            "raise sample.group_size, or set select.on_lone_success",
        )


def _reflection_causes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield the causes that are in the reflections."""
    if (found := _mean(rows, "reflect/found_frac", 1)) <= 1 - MISSED:
        yield (
            f"{1 - found:.0%} of the quotes are not in their rollouts",
            "set reflect.mode to verbatim; where it is, raise reflect.max_new_tokens",
        )
    if (refused := _mean(rows, "reflect/refused_frac")) >= MISSED:
        yield (
            f"{refused:.0%} of the explanations are refused",
            "loosen reflect.leak, reflect.min_explanation_words or reflect.max_copied_frac",
        )
    if _sum(rows, "control/num_unpaired") and not _sum(rows, "control/num_reflections"):
        yield (
            "no two problems of a step have reflections to exchange (reflect.control shuffled)",
            "raise sample.problems_per_step",
        )


def _sum(rows: Sequence[Row], name: str) -> float:
    return sum(row.get(name, 0) for row in rows)


def _mean(rows: Sequence[Row], name: str, default: float = 0) -> float:
    """The mean over the rows that have the metric; `default` where none has."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else default
