"""A run with nothing to learn from: what was seen in its last steps, and what would help."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosd_fast.types import Group, Verdict

Row = Mapping[str, Any]

MAX_ENDING = 60  # characters of a completion that are shown

TRUNCATED = 0.5  # from this share of truncated rollouts on, their length is named as a cause
MISSED = 0.5  # likewise for quotes that are not found, and for explanations that are refused
ANSWER_FIX = (
    "see with rosd-fast data how the prompts ask for an answer (data.answer_instruction), and what "
    "data.verifier reads"
)


class LearningWatch:
    """Watches the metrics of a run's steps, and says once when there is nothing to learn from.

    after: number of steps in a row, `select.warn_after_steps`; 0: never.
    rows: those that the run has written before, where it is resumed.
    """

    def __init__(self, after: int, rows: Iterable[Row] = ()) -> None:
        self._after = after
        self._last: deque[Row] = deque((row for row in rows if _is_step(row)), maxlen=after)
        self._said = False

    def see(self, row: Row, unanswered: str = "") -> str | None:
        """Return what to tell the user after the step of `row`, or None.

        The text comes once, and again when the run has learned something in between.

        unanswered: what `describe_unanswered` says about the step.
        """
        if not _is_step(row):
            return None
        self._last.append(row)
        if self._after == 0 or len(self._last) < self._after:
            return None
        text = advice(tuple(self._last), unanswered)
        new, self._said = not self._said, text is not None
        return text if new else None


class AnswerWatch:
    """Watches for a run in which no rollout gives an answer, so that right and wrong mean nothing.

    after: number of steps in a row, `select.stop_after_steps`; 0: never.
    """

    def __init__(self, after: int) -> None:
        self._after = after
        self._silent = 0

    def see(self, row: Row, unanswered: str = "") -> str | None:
        """Return why the run should end after the step of `row`, or None.

        unanswered: what `describe_unanswered` says about the step.
        """
        self._silent = self._silent + 1 if _is_silent(row) else 0
        if self._after == 0 or self._silent < self._after:
            return None
        fixes = "; ".join([ANSWER_FIX, *(": ".join(cause) for cause in _truncation([row]))])
        return (
            f"no rollout gave an answer in {_last_steps(self._silent)}{_in_brackets(unanswered)}, "
            f"so there is no right and wrong to learn from: {fixes}; select.stop_after_steps 0 "
            "trains on"
        )


def describe_unanswered(groups: Iterable[Group], verdicts: Mapping[str, Verdict]) -> str:
    """Return what the verifier says about rollouts without an answer, and the end of one of them.

    As in `no answer tag: 60 of 64 rollouts; one ends in '... so it is 72.'`, which is the most
    frequent reason; empty when every rollout gives an answer.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    reasons = {
        rollout.id: verdicts[rollout.id].reason or "no answer"
        for rollout in rollouts
        if verdicts[rollout.id].answer is None
    }
    if not reasons:
        return ""
    reason, count = Counter(reasons.values()).most_common(1)[0]
    text = next(rollout.text for rollout in rollouts if reasons.get(rollout.id) == reason).strip()
    cut = "..." if len(text) > MAX_ENDING else ""
    ending = f"one ends in {cut + text[-MAX_ENDING:]!r}" if text else "one is empty"
    return f"{reason}: {count} of {len(rollouts)} rollouts; {ending}"


def _is_silent(row: Row) -> bool:
    """Whether no rollout of a step gave an answer. A rollout that is right gave one."""
    return not (row.get("rollout/answer_found_frac", 1) or row["rollout/accuracy"])


def _last_steps(count: int) -> str:
    return "the last step" if count == 1 else f"the last {count} steps"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _is_step(row: Row) -> bool:
    """Whether the row is that of a training step, not of an evaluation alone."""
    return "rollout/trained_frac" in row


def advice(rows: Sequence[Row], unanswered: str = "") -> str | None:
    """Return what was seen in the steps of `rows` and what would help, as one line.

    None where a rollout was trained on and an answer was found.

    unanswered: what `describe_unanswered` says about the last step.
    """
    trained = any(row["rollout/trained_frac"] for row in rows)
    silent = all(map(_is_silent, rows))
    if trained and not silent:
        return None
    what = "no answer was found" if trained else "nothing to learn from"
    causes = list(_causes(rows, unanswered if silent else None))
    if not causes:
        causes = [("no rollout gave a sample", "see the metrics select/* and reflect/*")]
    found = "; ".join(f"{seen}: {fix}" for seen, fix in causes)
    return f"{what} in {_last_steps(len(rows))}: {found}"


def _causes(rows: Sequence[Row], unanswered: str | None) -> Iterator[tuple[str, str]]:
    """Yield (what was seen, what would help).

    unanswered: as for `advice`; None: answers were found.
    """
    if unanswered is not None:
        yield f"the verifier found no answer in any rollout{_in_brackets(unanswered)}", ANSWER_FIX
    yield from _truncation(rows)
    yield from _group_causes(rows)
    if _sum(rows, "reflect/num_reflections"):
        yield from _reflection_causes(rows)


def _truncation(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield the cause that is in the length of the rollouts."""
    if (share := _mean(rows, "rollout/truncated_frac")) >= TRUNCATED:
        yield (
            f"{share:.0%} of the rollouts reach sample.max_new_tokens",
            "raise it, or ask for shorter answers",
        )


def _group_causes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield the causes that are in the scores of the groups."""
    groups, hopeless = _sum(rows, "select/num_groups"), _sum(rows, "select/num_no_success")
    if not groups:
        return
    right = _sum(rows, "select/num_all_correct")
    missing = _sum(rows, "select/num_no_demonstration")
    dropped, referenceless = (
        _sum(rows, f"select/num_dropped_{reason}") for reason in ("no_success", "no_reference")
    )
    kept = hopeless > dropped + referenceless + _sum(rows, "select/num_rescued")
    shows = bool(missing) or any("reflect/num_reflections" in row for row in rows)
    bare = kept and shows  # select.on_no_success keep, in a method that shows correct rollouts
    if hopeless == groups:
        fix = "take easier problems, or raise sample.group_size"
        if referenceless:
            fix += ', or give the problems a "reference"'
        elif dropped or bare:
            fix += ", or set select.on_no_success to reference or answer"
        yield "no rollout is right", fix
    elif right == groups:
        yield "every rollout is right", "take harder problems, or raise sample.temperature"
    elif hopeless + right == groups:
        yield (
            f"{hopeless:.0f} of {groups:.0f} groups are all wrong and the others all right",
            "take problems between the two, or raise sample.group_size or sample.temperature",
        )
    if missing:
        option = "select.on_no_success" if bare else "select.on_lone_success"
        yield (
            f"{missing:.0f} rollouts have no correct sibling to show the teacher",
            f"raise sample.group_size, or set {option} to reference",
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
