"""The records that cross module boundaries.

One optimizer step moves through them from left to right. Each refers to the one before it by id, so
no stage keeps parallel lists:

    Problem -> Group[Rollout] -> Verdict -> Reflection -> ErrorSpan -> TrainSample -> PackedBatch

Token positions are always positions in `completion_ids`, the ids that were sampled: text is never
re-tokenized. Ranges are half-open. Log-probabilities are in nats.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
SpanSource = Literal["quote", "normalized", "fuzzy", "full", "random"]

WRONG = "wrong answer"
"""The reason of a `Judgement` on an answer that could be read and is not the right one."""
MAX_QUOTED_CHARS = 400
"""Longest answer that `Verdict.feedback` repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A turn of a conversation. `role` is system, user, assistant, or what the template knows."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with a verifiable answer.

    >>> Problem(id="biology:473", domain="biology", prompt="2 + 2 = ?", answer="4",
    verifier="number")
    """

    id: str
    domain: str  # the name its metrics are grouped under
    prompt: str  # the last user turn, as shown to the student
    answer: str  # what the verifier compares with
    verifier: str  # a name in rosd_fast.verify.VERIFIERS, or FILE.py:FUNCTION
    system: str | None = None  # the system turn, None: no system turn
    context: tuple[Message, ...] = ()  # the turns between the system turn and the prompt
    reference: str | None = None  # a worked solution of the data set, None: it has none
    teacher_prompt: str | None = None  # user turn of the teacher in place of its template's
    feedback: str | None = None  # told about a wrong rollout; None: what the verifier says
    weight: float = 1.0  # multiplies the loss of the problem's tokens; 0: they teach nothing

    def feedback_on(self, verdict: Verdict) -> str:
        """What a solver is told about a rollout: the data set's words, else the verifier's; empty
        for a success.
        """
        return "" if verdict.success else self.feedback or verdict.feedback

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, up to the user turn that the student answers."""
        first = () if self.system is None else (Message(role="system", content=self.system),)
        return (*first, *self.context, Message(role="user", content=self.prompt))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled; the fields are named as in the APIs of SGLang and transformers."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt, of which an engine samples `n` completions.

    `seed` and `id` alone fix what is sampled: the rest of the batch does not matter.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    n: int = 1
    seed: int = 0
    grammar: str | None = None  # Lark, in llguidance's dialect; None: any text
    affinity: str = ""  # requests of one affinity share a long prefix, so one server's KV cache
    background: bool = False  # servers get it when nothing else waits for them

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"request {self.id}: prompt_ids is empty")
        if self.n < 1:
            raise ValueError(f"request {self.id}: n is {self.n}, must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion. `completion_ids` includes the stop token when there was one."""

    request_id: str
    index: int  # 0 <= index < n
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the distribution sampled from, one per completion token
    finish_reason: FinishReason
    policy_version: int

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.completion_ids):
            raise ValueError(
                f"{self.request_id}/{self.index}: {len(self.completion_ids)} tokens but "
                f"{len(self.logprobs)} logprobs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A sampled answer to a problem; `id` is `<problem id>/<index in its group>`."""

    id: str
    problem_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # with the stop token, when there was one
    logprobs: tuple[float, ...]  # [len(completion_ids)]
    text: str  # decoded completion, special tokens left out
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a verifier says about a completion.

    answer: the answer found in it, None: none found.
    reason: why the score is not 1, as in "no answer tag" or "timed out"; never names the right
        answer. None: nothing to say.
    """

    score: float  # in [0, 1]
    answer: str | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"score {self.score} is outside [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verifier's judgement of a rollout. `success` is `score >= threshold`."""

    rollout_id: str
    score: float  # in [0, 1]
    success: bool
    answer: str | None  # the answer found in the completion, None: none found
    reason: str | None = None  # why the score is not 1, None: nothing to say

    @property
    def feedback(self) -> str:
        """What the verifier tells a solver, without the right answer; empty for a success."""
        if self.success:
            return ""
        if self.answer is None:
            why = self.reason or "no answer was found"
            return f"{why[:1].upper()}{why[1:]}."
        is_short = len(self.answer) <= MAX_QUOTED_CHARS and "\n" not in self.answer
        what = f"The answer {self.answer} is wrong" if is_short else "The answer is wrong"
        return f"{what}." if self.reason in (None, WRONG) else f"{what}: {self.reason}."

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"{self.rollout_id}: score {self.score} is outside [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflection:
    """What the model says about a rollout: where it goes wrong (`quote`), and the correct idea.

    quote: None for correct rollouts, and for wrong ones when the reflector wrote none.
    explanation: None when the reflector wrote none, or when it may not be used (`refused`).
    """

    rollout_id: str
    demonstration_id: str | None  # the correct sibling shown, "reference", "answer", or None: none
    correct: bool  # whether the rollout reflected on was correct
    text: str  # as generated, with the tag that the prompt ended with
    quote: str | None
    explanation: str | None
    well_formed: bool  # has every tag of the format, in order
    num_tokens: int
    sentence: int | None = None  # number of the quoted sentence, from 1; None: found by the quote
    mode: str = "free"  # reflect.mode that it was written in
    prompt_cut: bool = False  # whether the middle of a rollout was left out of the prompt
    shown_from: int = 0  # first token of the rollout that the prompt showed; above 0: not all of it
    tolerated: tuple[str, ...] = ()  # accepted faults of the format: "case", "unclosed", "cut"
    leaks: bool = False  # whether the explanation stated the final answer
    refused: str | None = None  # why the explanation is not used: "leak", "empty" or "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSpan:
    """The tokens of a rollout that are distilled: `completion_ids[start:end]`, never empty."""

    rollout_id: str
    start: int
    end: int
    source: SpanSource  # how the quote was found; "full": all tokens, or the answer; "random"
    error_end: int | None = None  # completion_ids[start:error_end] is the quoted error; None: none

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"{self.rollout_id}: span [{self.start}, {self.end}) is empty")
        if self.error_end is not None and not self.start < self.error_end <= self.end:
            raise ValueError(
                f"{self.rollout_id}: the error ends at {self.error_end}, outside of the span "
                f"[{self.start}, {self.end})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One loss on one range of a rollout's tokens: `completion_ids[start:end]`.

    The fields that are given name the loss of a token:

        teacher_prompt_ids   divergence from the teacher, which reads the same completion ids after
                             its own prompt
        advantage            policy gradient: clipped ratio times advantage
        neither              likelihood: -log p of the token

    A rollout may have two samples, a divergence and one of the others; packing then runs its tokens
    through the student once.
    """

    rollout_id: str
    problem_id: str
    student_prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the rollout engine, [len(completion_ids)]
    start: int
    end: int
    teacher_prompt_ids: tuple[int, ...] | None = None
    advantage: float | None = None
    weight: float = 1.0  # multiplies the loss of each of its tokens
    reflection_cut: bool = False  # whether the reflection had to be cut to fit the teacher's prompt

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= len(self.completion_ids):
            raise ValueError(
                f"{self.rollout_id}: span [{self.start}, {self.end}) does not lie in a completion "
                f"of {len(self.completion_ids)} tokens"
            )
        if len(self.logprobs) != len(self.completion_ids):
            raise ValueError(
                f"{self.rollout_id}: {len(self.completion_ids)} tokens but "
                f"{len(self.logprobs)} logprobs"
            )
        if not self.student_prompt_ids or self.teacher_prompt_ids == ():
            raise ValueError(
                f"{self.rollout_id}: a prompt is empty: no state precedes the first token"
            )
        if self.teacher_prompt_ids is not None and self.advantage is not None:
            raise ValueError(
                f"{self.rollout_id}: a sample has one loss; give the divergence and the policy "
                "gradient a sample each"
            )

    @property
    def num_tokens(self) -> int:
        """Number of trained tokens."""
        return self.end - self.start

    @property
    def is_distilled(self) -> bool:
        """Whether its loss is the divergence from the teacher."""
        return self.teacher_prompt_ids is not None

    @property
    def has_effect(self) -> bool:
        """Whether it may have a gradient without an entropy bonus: not with an advantage of 0."""
        return bool(self.weight) and self.advantage != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSequences:
    """S segments laid end to end without padding; a prefix shared by sequences is stored once.

    `parents[i]` is the segment that segment i continues, or -1: a token attends to its own segment
    and to the segments before it on its path, up to itself. The sequences "a b c d" and "a b e" are

        input_ids     a b c d e
        position_ids  0 1 2 3 2
        cu_seqlens    0 2 4 5        three segments: "a b", "c d", "e"
        parents       -1 0 0

    `gather[i]` is the row of the packed hidden states that predicts distilled token i; a row may
    predict the next token of several sequences.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, position in the sequence
    cu_seqlens: tuple[int, ...]  # [S + 1], 0 first and T last
    gather: Tensor  # [N] int64
    parents: tuple[int, ...] = ()  # [S], each below its own index; empty: each segment a sequence

    def __post_init__(self) -> None:
        if self.parents and len(self.parents) != len(self.cu_seqlens) - 1:
            raise ValueError(f"{len(self.parents)} parents of {len(self.cu_seqlens) - 1} segments")
        if any(parent >= index for index, parent in enumerate(self.parents)):
            raise ValueError("a segment continues a later one, or itself")

    @property
    def lengths(self) -> tuple[int, ...]:
        """[S] tokens of each segment."""
        return tuple(end - start for start, end in pairwise(self.cu_seqlens))

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """[S] the segments of each path: from the first of the sequence to the segment itself."""
        paths: list[tuple[int, ...]] = []
        for index in range(len(self.cu_seqlens) - 1):
            parent = self.parents[index] if self.parents else -1
            paths.append((index,) if parent < 0 else (*paths[parent], index))
        return tuple(paths)

    def rows(self, row: int) -> list[int]:
        """The rows of the sequence of `row`, in order and up to `row`."""
        last = bisect_right(self.cu_seqlens, row) - 1
        starts, ends = self.cu_seqlens, [*self.cu_seqlens[1:]]
        ends[last] = row + 1
        return [each for i in self.paths[last] for each in range(starts[i], ends[i])]

    def sequence(self, row: int) -> list[int]:
        """The token ids of the sequence of `row`, up to `row`."""
        return self.input_ids[self.rows(row)].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """The tokens of a micro-batch whose loss needs no teacher: policy gradient and likelihood.

    Row i of every [M] tensor is the same token.
    """

    gather: Tensor  # [M] int64, the row of the student's states that predicts it
    token_ids: Tensor  # [M] int64
    weights: Tensor  # [M] float32; the loss is the weighted sum
    advantages: Tensor  # [M] float32; 0 for a likelihood
    is_likelihood: Tensor  # [M] bool
    rollout_logprobs: Tensor  # [M] float32
    sample_index: Tensor  # [M] int64, which of the B samples a row belongs to


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosedTokens:
    """The tokens of a micro-batch on which the diagnostics compare student and teacher.

    Row i of both [M] tensors is the same token. None of the M tokens is trained.
    """

    rows: Tensor  # [n] int64, which of the N distilled tokens
    student_before: Tensor  # [M] int64, rows of the student's states that predict tokens before
    teacher_before: Tensor  # [M] int64, and of the teacher's; the trained range begins after them


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch of B samples: all under the student's prompt, the distilled ones also under the
    teacher's.

    Row i of every [N] tensor, and of both `gather`s, is the same distilled token. `teacher` is None
    in a step without distilled tokens, `policy` in a step that has nothing else, `diagnosed` in a
    step without diagnostics; all micro-batches of a step agree in that, because the ranks compute
    the same things at the same time.
    """

    rollout_ids: tuple[str, ...]  # [B]
    problem_ids: tuple[str, ...]  # [B], of those rollouts; samples of one share a long prefix
    student: PackedSequences
    teacher: PackedSequences | None
    token_ids: Tensor  # [N] int64, the distilled tokens
    weights: Tensor  # [N] float32
    rollout_logprobs: Tensor  # [N] float32
    sample_index: Tensor  # [N] int64, which of the B samples a row belongs to
    policy: PolicyTokens | None = None
    diagnosed: DiagnosedTokens | None = None

    @property
    def num_distilled(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_policy(self) -> int:
        """Number of tokens whose loss needs no teacher."""
        return 0 if self.policy is None else self.policy.token_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, student's plus teacher's."""
        teacher = 0 if self.teacher is None else self.teacher.cu_seqlens[-1]
        return self.student.cu_seqlens[-1] + teacher
