"""What an evaluation is made of: how completions are sampled, what is stored of each, figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from rosd_fast.stats import Estimate
from rosd_fast.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled and judged.

    samples: completions per problem; one at temperature 0, where all would be equal.
    max_new_tokens: tokens after which a completion is cut.
    threshold: least score of a success.
    seed: with split and problem id it fixes the draws, where the engine allows that.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    threshold: float
    seed: int

    @property
    def per_problem(self) -> int:
        """The number of completions that are sampled of each problem."""
        return 1 if self.temperature == 0 else self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One completion of a problem, judged. A line of completions.jsonl has the same fields."""

    split: str  # the data set that the problem is from
    problem_id: str
    domain: str
    index: int  # among the completions of its problem, from 0
    score: float  # in [0, 1]
    success: bool  # whether the score reaches the threshold
    answer: str | None  # found in the text, None: none found
    reason: str | None  # why the score is not 1, None: nothing to say
    text: str
    num_tokens: int  # with the stop token, when there was one
    finish_reason: FinishReason

    @property
    def key(self) -> tuple[str, str]:
        """What tells its problem from all others."""
        return self.split, self.problem_id


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("split", "problem_id", "domain", "text", "finish_reason"), (str,)),
    **dict.fromkeys(("index", "num_tokens"), (int,)),
    **dict.fromkeys(("answer", "reason"), (str, type(None))),
    "score": (float, int),
    "success": (bool,),
}


def completion_from(stored: Any) -> Completion:
    """The completion that a line of completions.jsonl holds.

    Raises ValueError, naming the first field that is wrong.
    """
    if not isinstance(stored, dict):
        raise ValueError("it is no JSON object")
    for name in stored.keys() ^ _TYPES.keys():
        raise ValueError(f"{'unknown field' if name in stored else 'no field'} {name!r}")
    for name, types in _TYPES.items():
        if type(stored[name]) not in types:
            raise ValueError(f"the field {name!r} is {stored[name]!r:.40}")
    if not 0 <= stored["score"] <= 1:
        raise ValueError(f"the score {stored['score']} is outside of [0, 1]")
    if stored["finish_reason"] not in get_args(FinishReason):
        raise ValueError(f"the finish_reason is {stored['finish_reason']!r:.40}")
    return Completion(**stored)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Figures of a model minus those of another on the same problems, paired by problem.

    before, after: accuracy of the other model, and of the model itself, on these problems.
    pass_at: by the j that both have completions for.
    """

    num_problems: int
    before: float
    after: float
    accuracy: Estimate
    pass_at: Mapping[int, Estimate]
    majority: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The problems that figures are of: all, those of a data set, or of a domain in it."""

    split: str | None = None  # None: all data sets
    domain: str | None = None  # None: all domains

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        return self.domain or self.split or "all"
