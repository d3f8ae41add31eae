"""What a training method is: the stages between verified rollouts and training samples.

    sample -> verify -> select -> [annotate -> build] -> learn -> sync
                                   a method's own

The loop (`rosd_fast.train`) samples, verifies and selects groups the same way for every method, and
trains on whatever samples the method builds. A method therefore answers three questions:

    what must be generated before a rollout can teach?     `annotate`
    which tokens are trained, under which teacher prompt?  `build`
    what has to be checked before the run starts?          `check_options`, `check_problems`
    and of a problem that is first read while it runs?     `check_problem`

The methods of this package (`docs/methods.md` has the table of the family):

    method  annotate                 build: the samples of a rollout
    rosd    reflections (an engine)  teacher prompt with the reflection; from the located error
    sdpo    nothing                  teacher prompt with a correct sibling; all tokens
    opsd    nothing                  teacher prompt with the reference solution; all tokens
    opd     nothing                  teacher prompt = student prompt, another model; all tokens
    grpo    nothing                  the group's advantage; all tokens
    sft     nothing                  the likelihood of correct rollouts; all tokens

Any method that distills can add the policy gradient (`loss.policy_weight`); grpo can add the
divergence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from rosd_fast.config.checks import control_arms
from rosd_fast.errors import UserError
from rosd_fast.methods.targets import policy_samples, whole
from rosd_fast.report.stages import Stage

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.model.load import LoadedModel
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.text.chat import Chats
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import (
        ErrorSpan,
        Group,
        Problem,
        Reflection,
        Rollout,
        TrainSample,
        Verdict,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What a step trains on, as `Method.build` returns it.

    samples: at most two per rollout, of which at most one is distilled. Their order decides which
        problems are a mini-batch (`optim.updates_per_step`), and nothing else.
    spans: by rollout id, the tokens of each distilled sample and how they were found. A rollout
        that has a span and no sample is not distilled.
    metrics: those of the method's own stages, with names such as `reflect/num_reflections`.

    Raises ValueError for two samples of one rollout with the same kind of loss, and for a distilled
    sample that is not its span.
    """

    samples: Sequence[TrainSample]
    spans: Mapping[str, ErrorSpan] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({(s.rollout_id, s.is_distilled) for s in self.samples}) < len(self.samples):
            raise ValueError("a rollout has two samples of one kind; a step trains each once")
        for sample in self.samples:
            if not sample.is_distilled:
                continue
            span = self.spans.get(sample.rollout_id)
            if span is None or (span.start, span.end) != (sample.start, sample.end):
                raise ValueError(
                    f"{sample.rollout_id}: the sample trains tokens [{sample.start}, {sample.end}) "
                    f"and its span is {span}"
                )


OWN_OPTIONS = (
    "reflect.*",
    "span.*",
    "select.on_*",
    "teacher.*_template",
    "teacher.demonstration_note",
    "teacher.show_feedback",
)
"""Patterns of the options that some methods read and others do not."""
TEACHER_OPTIONS = ("teacher.*",)  # read where anything is distilled
POLICY_OPTIONS = ("policy.advantage", "policy.*clip*", "policy.mask_truncated")  # or reinforced


class Method(ABC):
    """Turns verified rollouts into training samples.

    config: all options; a method documents the sections that it reads.
    model: the student as loaded, with its tokenizer and stop tokens.
    token_bytes: the bytes that each sampled token stands for.
    chats: how the prompts of each role are rendered.
    """

    annotate_stage: Stage = Stage.REFLECT  # counts the time of `annotate`; streamed, sampling does
    default_weights: ClassVar[tuple[float, float]] = (1.0, 0.0)  # divergence, policy gradient
    needs_success: ClassVar[bool] = True  # whether `select.on_no_success` applies
    tells_apart: ClassVar[bool] = True  # whether it trains right and wrong rollouts differently
    has_reflections: ClassVar[bool] = False  # whether it has the control arms of the reflection
    reads: ClassVar[tuple[str, ...]] = OWN_OPTIONS  # those of them that it reads

    def __init__(
        self, config: Config, model: LoadedModel, token_bytes: TokenBytes, chats: Chats
    ) -> None:
        self.config = config
        self.model = model
        self.token_bytes = token_bytes
        self.chats = chats

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError for options that do not fit the method. Runs before a model is loaded.

        A method that overrides this calls it first.
        """
        if not any(cls.weights(config)):
            raise UserError(
                "both are 0, so nothing would be trained",
                where="loss.distill_weight and loss.policy_weight",
                fix="Give one of them",
            )
        if not cls.has_reflections and (arms := control_arms(config)):
            raise UserError(
                f"the method {config.method} has no reflection and locates no error",
                where=arms[0],
                fix="Leave it out, or choose the method rosd",
            )
        if cls.weights(config)[0]:
            return
        for option, given in (
            ("teacher.model", config.teacher.model),
            ("teacher.backend", config.teacher.backend == "sglang" and "sglang"),
        ):
            if given:
                raise UserError(
                    "nothing is distilled, so the teacher would never be used",
                    where=f"{option}: {given}",
                    fix="Leave it out, or set loss.distill_weight",
                )

    @classmethod
    def unread(cls, config: Config, names: Iterable[str]) -> list[str]:
        """Return those of the options `names` that a run of this method never reads."""
        distill, policy = cls.weights(config)
        unread = [] if distill else [*TEACHER_OPTIONS]
        unread += [] if policy else [*POLICY_OPTIONS]
        return [
            name
            for name in names
            if _matches(name, unread)
            or (_matches(name, OWN_OPTIONS) and not _matches(name, cls.reads))
        ]

    @classmethod
    def weights(cls, config: Config) -> tuple[float, float]:
        """The weights of the divergence and of the policy gradient in the loss."""
        loss, (distill, policy) = config.loss, cls.default_weights
        return (
            distill if loss.distill_weight is None else loss.distill_weight,
            policy if loss.policy_weight is None else loss.policy_weight,
        )

    @classmethod
    def refuse_weight(
        cls, config: Config, name: Literal["distill_weight", "policy_weight"]
    ) -> None:
        """Raise UserError where `loss.NAME`, which the method has no use for, is above 0."""
        if getattr(config.loss, name):
            raise UserError(
                f"the method {config.method} has no such loss",
                where=f"loss.{name}",
                fix="Leave it out, or choose another method",
            )

    @property
    def distill_weight(self) -> float:
        """Weight of the divergence in the loss."""
        return self.weights(self.config)[0]

    @property
    def policy_weight(self) -> float:
        """Weight of the policy gradient in the loss."""
        return self.weights(self.config)[1]

    @property
    def needs_verdicts(self) -> bool:
        """Whether a run teaches nothing as long as no rollout gives an answer."""
        return self.tells_apart or self.policy_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is distilled; without it no teacher is kept."""
        return self.distill_weight > 0

    @property
    def annotates(self) -> bool:
        """Whether anything is generated after the rollouts, before they can teach."""
        return type(self).annotate is not Method.annotate

    @property
    def needs_teacher_engine(self) -> bool:
        """Whether text is generated with the teacher's weights (`Engines.teacher`)."""
        return False

    def check_problem(self, problem: Problem) -> None:  # noqa: B027
        """Raise UserError for a problem that the method cannot train on.

        It is asked of the problems of a large data set that were not among `check_problems`.
        """

    def check_problems(self, problems: Sequence[Problem]) -> None:  # noqa: B027
        """Raise UserError for a problem, or a tokenizer, that the method cannot train on."""

    async def annotate(
        self,
        step: int,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        engines: Engines,
        progress: Progress | Hidden,
    ) -> dict[str, Reflection]:
        """Generate what the rollouts of `groups` need before they can teach, by rollout id.

        Called on all kept groups of a step at once, or on each as soon as it is verified, while
        others still sample; the result must not depend on which. The default needs nothing.
        """
        return {}

    @abstractmethod
    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Return what the step trains on, given what `annotate` returned."""

    def distilled_span(self, rollout: Rollout) -> ErrorSpan | None:
        """The span of the tokens after thinking, or with `span.thinking` of all tokens.

        None when there are no such tokens.
        """
        start = 0 if self.config.span.thinking else self.chats.num_thinking(rollout)
        return whole(rollout, start) if start < len(rollout.completion_ids) else None

    def training_set(
        self,
        samples: Sequence[TrainSample],
        spans: Mapping[str, ErrorSpan],
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        metrics: Mapping[str, float] | None = None,
    ) -> TrainingSet:
        """The training set of distilled `samples` under the method's weights, with the policy
        gradient of all rollouts in `groups` where that has a weight.

        Samples are in the order of `groups`, so that mini-batches are of consecutive problems.

        groups, verdicts, metrics: as for `build` and `TrainingSet`.
        """
        distill, policy = self.weights(self.config)
        weighted = [
            replace(sample, weight=distill * sample.weight) if sample.is_distilled else sample
            for sample in samples
            if distill or not sample.is_distilled
        ]
        if policy:
            weighted += policy_samples(groups, verdicts, self.config.policy, weight=policy)
            place = {group.problem.id: index for index, group in enumerate(groups)}
            weighted.sort(key=lambda sample: place[sample.problem_id])
        return TrainingSet(samples=weighted, spans=spans, metrics=metrics or {})

    async def measure(
        self,
        step: int,
        training: TrainingSet,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        engines: Engines,
        progress: Progress | Hidden,
    ) -> dict[str, float]:
        """Return further metrics that cost sampling, before the update. The default has none."""
        return {}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
