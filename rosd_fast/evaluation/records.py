"""What an evaluation is made of: how completions are sampled, and what is stored of each."""

from __future__ import annotations

from dataclasses import dataclass

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
