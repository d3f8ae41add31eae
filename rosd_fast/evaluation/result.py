"""Completions -> figures: accuracy, pass@j, majority, truncation, each with its interval."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from rosd_fast.evaluation.records import Completion, Difference, Figures, Scope
from rosd_fast.stats import Estimate, estimate_difference, estimate_mean, majority, pass_at
from rosd_fast.verify.quantity import parse_quantity
from rosd_fast.verify.words import normalize


def figures(completions: Iterable[Completion]) -> Figures:
    """The figures of completions, which are k of each problem, in any order.

    Raises ValueError without completions, and when problems have different numbers of them.
    """
    problems = by_problem(completions)
    samples = samples_of(problems)

    def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
        return estimate_mean(values, samples=samples)

    def share(values: Sequence[Sequence[float]]) -> Estimate:
        return estimate(np.asarray(values, np.float64).mean(1))

    right = successes(problems)
    tokens = np.array([[c.num_tokens for c in own] for own in problems], np.float64)
    most = max(1.0, tokens.max())
    scaled = estimate(tokens.mean(1) / most)
    return Figures(
        num_problems=len(problems),
        samples=samples,
        accuracy=estimate(right / samples),
        score=share([[c.score for c in own] for own in problems]),
        pass_at={j: estimate(pass_at(right, samples, j)) for j in range(1, samples + 1)},
        majority=estimate([problem_majority(own) for own in problems]),
        answered_frac=share([[c.answer is not None for c in own] for own in problems]),
        truncated_frac=share([[c.finish_reason == "length" for c in own] for own in problems]),
        tokens_mean=Estimate(
            value=scaled.value * most, low=scaled.low * most, high=scaled.high * most
        ),
    )


def difference(new: Iterable[Completion], old: Iterable[Completion]) -> Difference | None:
    """The figures of `new` minus those of `old`, over the problems that both have; None: none."""
    pairs = {own[0].key: own for own in by_problem(old)}
    news = [own for own in by_problem(new) if own[0].key in pairs]
    olds = [pairs[own[0].key] for own in news]
    if not news:
        return None
    k, old_k = samples_of(news), samples_of(olds)
    right, old_right = successes(news), successes(olds)
    return Difference(
        num_problems=len(news),
        before=float(old_right.mean() / old_k),
        after=float(right.mean() / k),
        accuracy=estimate_difference(old_right / old_k, right / k),
        pass_at={
            j: estimate_difference(pass_at(old_right, old_k, j), pass_at(right, k, j))
            for j in range(1, min(k, old_k) + 1)
        },
        majority=estimate_difference(
            [problem_majority(own) for own in olds], [problem_majority(own) for own in news]
        ),
    )


def scopes(completions: Iterable[Completion]) -> list[Scope]:
    """What figures are given of: each data set and its domains, and at the end all problems.

    A data set of one domain has no line for it, and a single data set none for all.
    """
    domains: dict[str, set[str]] = {}
    for completion in completions:
        domains.setdefault(completion.split, set()).add(completion.domain)
    found = []
    for split, names in domains.items():
        found.append(Scope(split=split))
        if len(names) > 1:
            found += [Scope(split=split, domain=name) for name in sorted(names)]
    return [*found, Scope()] if len(domains) > 1 else found


def within(completions: Iterable[Completion], scope: Scope) -> list[Completion]:
    """The completions of a scope."""
    return [
        c
        for c in completions
        if scope.split in (None, c.split) and scope.domain in (None, c.domain)
    ]


def by_problem(completions: Iterable[Completion]) -> list[list[Completion]]:
    """The completions of each problem, ordered by split, problem and index."""
    ordered = sorted(completions, key=lambda c: (*c.key, c.index))
    return [list(group) for _, group in groupby(ordered, key=lambda c: c.key)]


def samples_of(problems: Sequence[Sequence[Completion]]) -> int:
    """The number of completions of each problem. Raises ValueError where they differ."""
    counts = {len(own) for own in problems}
    if len(counts) != 1:
        raise ValueError(f"problems have {sorted(counts)} completions, figures need one number")
    return counts.pop()


def successes(problems: Sequence[Sequence[Completion]]) -> np.ndarray:
    """[n] int64, the number of right completions of each problem."""
    return np.array([sum(c.success for c in own) for own in problems], np.int64)


def problem_majority(completions: Sequence[Completion]) -> float:
    """The probability that the most frequent answer of a problem is right."""
    return majority(
        [None if c.answer is None else vote(c.answer) for c in completions],
        [c.success for c in completions],
    )


def vote(answer: str) -> str:
    """The answer in a form in which equal answers are equal texts: "$1,234.0" and "1234"."""
    text = normalize(unicodedata.normalize("NFKC", answer)).strip("$ ").removesuffix(".")
    if (number := parse_quantity(text)) is not None:
        return str(number.value)  # a unit may be left out
    if text[:1] in ("[", "{"):
        try:
            return json.dumps(json.loads(answer), sort_keys=True)
        except (ValueError, RecursionError):
            return text
    return text


def group_by_domain(completions: Iterable[Completion]) -> dict[str, list[Completion]]:
    """The completions of each domain, by its name, in order of name."""
    found: dict[str, list[Completion]] = {}
    for completion in completions:
        found.setdefault(completion.domain, []).append(completion)
    return dict(sorted(found.items()))
