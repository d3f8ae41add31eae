"""What a data set is: counts, lengths, repetitions, bad rows. `rosd-fast data` prints it.

Problems -> summarize -> Summary     one pass over the rows, which takes 40 bytes per problem
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rosd_fast.data.fields import unmatchable
from rosd_fast.data.instruct import OFF, instruction_of
from rosd_fast.data.keys import Keys, problem_key, repeated
from rosd_fast.data.problems import Problems
from rosd_fast.errors import UserError
from rosd_fast.types import Judgement, Problem

MAX_LISTED = 20  # bad rows that are listed per kind
NUM_BARS = 10
BATCH = 2048  # problems whose answers are checked at a time

_LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d[\d.,]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a histogram: the number of values in [low, high]; high None: and above."""

    low: int
    high: int | None
    count: int


@dataclass(slots=True)
class Faults:
    """Bad rows by kind: a kind is what was wrong, but for the row's own texts and numbers.

    listed: kind -> the first ones, as errors say them.
    """

    counts: Counter[str] = field(default_factory=Counter)
    listed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, error: UserError) -> None:
        """Count a bad row, and list it if it is among the first of its kind."""
        kind = _LITERAL.sub("...", error.what)
        self.counts[kind] += 1
        if len(self.listed[kind]) < MAX_LISTED:
            self.listed[kind].append(str(error))

    def __len__(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a data set is. The arrays have an entry per problem, bad rows left out.

    indices: of the problems in the data set.
    groups: (domain, verifier) -> number of problems. with_system: of these, with a system turn.
    fields: what some problems have beyond prompt and answer -> number of problems.
    instructions: the sentence added to a prompt, "" for none -> number of prompts.
    lengths: [n] characters of the prompts, instruction included.
    answers: [n] keys of the answers.
    first: verifier -> the indices of its first problems with different answers, two at most.
    """

    indices: np.ndarray
    groups: Counter[tuple[str, str]]
    with_system: Counter[tuple[str, str]]
    fields: Counter[str]
    instructions: Counter[str]
    lengths: np.ndarray
    keys: Keys
    answers: np.ndarray
    first: dict[str, list[int]]
    faults: Faults

    @property
    def repetitions(self) -> np.ndarray:
        """[r, 2] (index, index of the first one) of problems that stand in the data set before."""
        return self.indices[repeated(self.keys)]

    @property
    def contradictions(self) -> np.ndarray:
        """The repetitions that have another answer than the first one."""
        pairs = repeated(self.keys)
        differ = self.answers[pairs[:, 0]] != self.answers[pairs[:, 1]]
        return self.indices[pairs[differ]]


def summarize(
    problems: Problems,
    check: Callable[[Sequence[Problem]], Sequence[Judgement]],
    *,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Summary:
    """Read every row of a data set. A row that is not a problem is among the faults.

    check: how the verifiers score an example of a right completion to each of some problems; where
    that is less than 1, no completion can be right. on_rows: told the number of rows read so far.
    """
    found = Collected()
    for start in range(0, len(problems), BATCH):
        good = [*readable(problems, range(start, min(start + BATCH, len(problems))), found.faults)]
        judgements = check([problem for _, problem in good])
        for (index, problem), judgement in zip(good, judgements, strict=True):
            if judgement.score < 1:
                found.faults.add(unmatchable(problem, problems.where(index)))
            else:
                found.add(problems, index, problem)
        on_rows(min(start + BATCH, len(problems)))
    return found.summary()


def readable(
    problems: Problems, indices: Iterable[int], faults: Faults
) -> Iterator[tuple[int, Problem]]:
    """(index, problem without instruction) of the rows that are problems; others are faults."""
    for index in indices:
        try:
            yield index, problems.bare(index)
        except UserError as error:
            faults.add(error)


@dataclass(slots=True)
class Collected:
    """What is known of the problems read so far."""

    faults: Faults = field(default_factory=Faults)
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)
    with_system: Counter[tuple[str, str]] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    instructions: Counter[str] = field(default_factory=Counter)
    arrays: dict[str, array[int]] = field(
        default_factory=lambda: {
            "indices": array("q"),
            "lengths": array("q"),
            "keys": array("Q"),
            "answers": array("Q"),
        }
    )
    first: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, problems: Problems, index: int, problem: Problem) -> None:
        """Count a problem."""
        setting = OFF if problems.source(index).is_quickstart else problems.instruction
        sentence = instruction_of(problem, setting)
        group = (problem.domain, problem.verifier)
        answer = problem_key(problem.answer)
        self.groups[group] += 1
        self.with_system[group] += problem.system is not None
        self.fields.update(extra_fields(problem))
        self.instructions[sentence] += 1
        length = len(problem.prompt) + (len(sentence) + 2 if sentence else 0)
        key = problem_key(problem.prompt, problem.context)
        for name, value in zip(self.arrays, (index, length, key, answer), strict=True):
            self.arrays[name].append(value)
        first = self.first[problem.verifier]
        if len(first) < 2:
            first.setdefault(answer, index)

    def summary(self) -> Summary:
        """All of it."""
        arrays = {name: np.array(values) for name, values in self.arrays.items()}
        return Summary(
            groups=self.groups,
            with_system=self.with_system,
            fields=self.fields,
            instructions=self.instructions,
            first={name: [*first.values()] for name, first in self.first.items()},
            faults=self.faults,
            **arrays,
        )


def extra_fields(problem: Problem) -> list[str]:
    """The names of what a problem has beyond prompt, answer, domain, verifier and system turn."""
    has = {
        "context": bool(problem.context),
        "reference": problem.reference is not None,
        "teacher_prompt": problem.teacher_prompt is not None,
        "feedback": problem.feedback is not None,
        "weight": problem.weight != 1.0,
    }
    return [name for name, given in has.items() if given]


def histogram(values: Sequence[int] | np.ndarray, bars: int = NUM_BARS) -> list[Bar]:
    """At most `bars` bars of one round width. The last has no end where a few values are far off.

    >>> histogram([3, 5, 12])
    [Bar(low=0, high=4, count=1), Bar(low=5, high=9, count=1), Bar(low=10, high=14, count=1)]
    """
    found = np.asarray(values)
    if not len(found):
        return []
    low, most = int(found.min()), int(found.max())
    usual = int(np.quantile(found, 0.99, method="higher"))
    width = next(w for w in _widths() if usual // w - low // w < bars)
    start = low // width
    places = found // width - start
    last = int(places.max()) if places.max() < bars else usual // width - start
    counts = np.bincount(np.minimum(places, last), minlength=last + 1).tolist()
    edges = [(start + i) * width for i in range(last + 2)]
    return [
        Bar(low=a, high=None if i == last and most >= b else b - 1, count=count)
        for i, (a, b, count) in enumerate(zip(edges, edges[1:], counts, strict=False))
    ]


def _widths() -> Iterable[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    width = 1
    while True:
        yield from (width, 2 * width, 5 * width)
        width *= 10
