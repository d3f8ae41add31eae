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

from rosd_fast.data.checks import AT_ONCE, Ids, spread
from rosd_fast.data.collection import Problems
from rosd_fast.data.fields import unmatchable
from rosd_fast.data.keys import Keys, problem_key, repeated
from rosd_fast.data.notes import added_sentence
from rosd_fast.data.similar import similar_pairs
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS

MAX_COMPARED = 100_000  # problems among which near-duplicates are looked for
MAX_LISTED = 20  # bad rows that are listed per kind
NUM_BARS = 10
NO_ANSWER = "I am not sure."

_LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d[\d.,]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a histogram: the number of values in [low, high]; high None: and above."""

    low: int
    high: int | None
    count: int

    @property
    def name(self) -> str:
        """The range in words."""
        if self.high is None:
            return f"{self.low:,} or more"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


@dataclass(slots=True)
class Faults:
    """Bad rows by kind: what is wrong, with "..." for the row's own texts and numbers.

    counts: kind -> number of rows. listed: kind -> the first ones.
    """

    counts: Counter[str] = field(default_factory=Counter)
    listed: dict[str, list[UserError]] = field(default_factory=lambda: defaultdict(list))

    def add(self, error: UserError) -> None:
        """Count a bad row, and list it if it is among the first of its kind."""
        kind = _LITERAL.sub("...", error.what)
        self.counts[kind] += 1
        if len(self.listed[kind]) < MAX_LISTED:
            self.listed[kind].append(error)

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

    def similar(self, problems: Problems) -> tuple[np.ndarray, int]:
        """([p, 2] indices of near-duplicates, number of different problems that were compared).

        Of very many problems some are compared, spread evenly.
        """
        _, first = np.unique(self.keys, return_index=True)
        some = np.sort(first)
        some = self.indices[some[spread(len(some), min(len(some), MAX_COMPARED))]]
        bare = map(problems.bare, some.tolist())
        pairs = similar_pairs([(problem.prompt, problem.answer) for problem in bare])
        return some[pairs], len(some)

    @property
    def contradictions(self) -> np.ndarray:
        """The repetitions that have another answer than the first one."""
        pairs = repeated(self.keys)
        differ = self.answers[pairs[:, 0]] != self.answers[pairs[:, 1]]
        return self.indices[pairs[differ]]


def summarize(problems: Problems, on_rows: Callable[[int], None] | None = None) -> Summary:
    """Read and check every row of a data set. A row that is not a problem is among the faults.

    problems: all of a data set, none of them checked. on_rows: told the number of rows read so far.
    """
    found, ids = Collected(), Ids(problems)
    for start in range(0, len(problems), AT_ONCE):
        stop = min(start + AT_ONCE, len(problems))
        good = [*readable(problems, range(start, stop), found.faults)]
        right = problems.answers.right([problem for _, problem in good])
        for (index, problem), is_right in zip(good, right, strict=True):
            where = problems.where(index)
            fault = ids.add(index, problem.id) if is_right else unmatchable(problem, where)
            if fault is not None:
                found.faults.add(fault)
            else:
                found.add(index, problem, added_sentence(problems, index, problem))
        if on_rows is not None:
            on_rows(stop)
    return found.summary()


def readable(
    problems: Problems, indices: Iterable[int], faults: Faults
) -> Iterator[tuple[int, Problem]]:
    """(index, problem without instruction) of the rows that are problems; others are faults."""
    for index in indices:
        try:
            problem = problems.bare(index)
            problems.answers.open(problem.verifier, problems.where(index))
            yield index, problem
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

    def add(self, index: int, problem: Problem, sentence: str) -> None:
        """Count a problem. sentence: the instruction that its prompt will end with."""
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


def trials(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """(what it is, completion) to show how the verifier of a problem scores: right, another, none.

    problems: the problem, and if there is one another with the same verifier and another answer:
    its right completion is another answer here.
    """
    found = [right_completion(problem) for problem in problems]
    own = [each for each in found[:1] if each is not None]
    another = [("another answer", each[1]) for each in found[1:2] if each is not None]
    return [*own, *another, ("no answer", NO_ANSWER)]


def right_completion(problem: Problem) -> tuple[str, str] | None:
    """(what it is, completion) that should be right; None where nothing is known to be.

    Only the worker processes can call the example of a user's file where it is a function.
    """
    verifier = VERIFIERS[problem.verifier]
    if verifier.runs_code:
        return None if problem.reference is None else ("reference", problem.reference)
    if verifier.accepts is None and (text := verifier.perfect(problem.answer)):
        return "right answer", text
    return "the answer alone", problem.answer


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
