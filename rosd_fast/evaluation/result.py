"""Completions -> figures: accuracy, pass@j, majority, truncation, each with its interval."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rosd_fast.evaluation.records import Completion
from rosd_fast.stats import Estimate, estimate_mean, majority, pass_at
from rosd_fast.verify.number import parse_number
from rosd_fast.verify.words import normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What k completions per problem say about a model. Intervals are over problems.

    accuracy: mean@k, the share of completions that are right.
    score: mean score of the verifier, which is the accuracy unless it gives shaped scores.
    pass_at: by j from 1 to k, the probability that one of j completions is right.
    majority: maj@k, the probability that the most frequent answer is right.
    answered_frac: share of completions with an answer.
    truncated_frac: share of completions cut at the maximum number of tokens.
    tokens_mean: tokens per completion.
    """

    num_problems: int
    samples: int  # k
    accuracy: Estimate
    score: Estimate
    pass_at: Mapping[int, Estimate]
    majority: Estimate
    answered_frac: Estimate
    truncated_frac: Estimate
    tokens_mean: Estimate


def figures(completions: Sequence[Completion]) -> Figures:
    """The figures of completions, which are k of each problem, in any order.

    Raises ValueError without completions, and when problems have different numbers of them.
    """
    problems = by_problem(completions)
    samples = len(problems[0]) if problems else 0
    if not samples or any(len(own) != samples for own in problems):
        raise ValueError("figures need the same number of completions of each problem")

    def share(values: Sequence[Sequence[float]]) -> Estimate:
        return estimate_mean(np.asarray(values, np.float64).mean(1))

    right = np.array([sum(c.success for c in own) for own in problems])
    tokens = np.array([[c.num_tokens for c in own] for own in problems], np.float64)
    most = max(1.0, tokens.max())
    scaled = estimate_mean(tokens.mean(1) / most)
    return Figures(
        num_problems=len(problems),
        samples=samples,
        accuracy=estimate_mean(right / samples),
        score=share([[c.score for c in own] for own in problems]),
        pass_at={j: estimate_mean(pass_at(right, samples, j)) for j in range(1, samples + 1)},
        majority=estimate_mean([problem_majority(own) for own in problems]),
        answered_frac=share([[c.answer is not None for c in own] for own in problems]),
        truncated_frac=share([[c.finish_reason == "length" for c in own] for own in problems]),
        tokens_mean=Estimate(
            value=scaled.value * most, low=scaled.low * most, high=scaled.high * most
        ),
    )


def problem_majority(completions: Sequence[Completion]) -> float:
    """The probability that the most frequent answer of a problem is right."""
    return majority(
        [None if c.answer is None else vote(c.answer) for c in completions],
        [c.success for c in completions],
    )


def vote(answer: str) -> str:
    """The answer in a form in which equal answers are equal texts: "$1,234.0" and "1234"."""
    text = normalize(unicodedata.normalize("NFKC", answer)).strip("$ ").removesuffix(".")
    number = parse_number(text)
    if number is not None:
        return str(number)
    if text[:1] in ("[", "{"):
        try:
            return json.dumps(json.loads(answer), sort_keys=True)
        except (ValueError, RecursionError):
            return text
    return text


def by_problem(completions: Sequence[Completion]) -> list[list[Completion]]:
    """The completions of each problem, ordered by split, problem and index."""
    ordered = sorted(completions, key=lambda c: (c.split, c.problem_id, c.index))
    groups = groupby(ordered, key=lambda c: (c.split, c.problem_id))
    return [list(group) for _, group in groups]


def group_by_domain(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    """The completions of each domain, by its name, in order of name."""
    found: dict[str, list[Completion]] = {}
    for completion in completions:
        found.setdefault(completion.domain, []).append(completion)
    return dict(sorted(found.items()))
