"""What a training method is: the stages between verified rollouts and training samples.

    sample -> verify -> select -> [annotate -> build] -> learn -> sync
                                   a method's own

The loop (`rosd_fast.train`) samples, verifies and selects groups the same way for every method, and
trains on whatever samples the method builds. A method therefore answers three questions:

    what must be generated before a rollout can teach?     `annotate`
    which tokens are trained, under which teacher prompt?  `build`
    what has to be checked before the run starts?          `check_options`, `check_problems`

How the methods of the field fit in (`docs/method.md` has the table of the family):

    method  annotate                 build: one sample per rollout
    rosd    reflections (an engine)  teacher prompt with the reflection; from the located error
    sdpo    nothing                  teacher prompt with a correct sibling; all tokens
    opsd    nothing                  teacher prompt with the reference solution; all tokens
    opd     nothing                  teacher prompt = student prompt; all tokens
    grpo    nothing                  no teacher prompt; `weight` holds the group's advantage
    sft     nothing                  no teacher prompt; correct rollouts, all tokens

SDPO needs only a file beside `rosd.py`. OPSD also needs a reference solution in `Problem`, OPD a
teacher loaded from another model. GRPO and SFT train without a teacher: `DistillSample` must first
allow an empty `teacher_prompt_ids`, packing a micro-batch without a teacher's side, and
`rosd_fast.trainer.loss` needs their loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rosd_fast.report.stages import Stage

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.model.load import LoadedModel
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.text.chat import Chats
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import DistillSample, ErrorSpan, Group, Problem, Reflection, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What a step trains on, as `Method.build` returns it.

    samples: at most one per rollout; the order decides nothing.
    spans: by rollout id, the trained tokens of each sample and how they were found. A rollout that
        has a span and no sample is not trained.
    metrics: of the method's own stages, with names such as `reflect/num_reflections`.

    Raises ValueError for two samples of one rollout, and for a sample that is not its span.
    """

    samples: Sequence[DistillSample]
    spans: Mapping[str, ErrorSpan]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({sample.rollout_id for sample in self.samples}) < len(self.samples):
            raise ValueError("a rollout has two samples; a step trains each rollout once")
        for sample in self.samples:
            span = self.spans.get(sample.rollout_id)
            if span is None or (span.start, span.end) != (sample.start, sample.end):
                raise ValueError(
                    f"{sample.rollout_id}: the sample trains tokens [{sample.start}, {sample.end}) "
                    f"and its span is {span}"
                )


class Method(ABC):
    """Turns verified rollouts into training samples.

    config: all options; a method documents the sections that it reads.
    model: the student as loaded, with its tokenizer and stop tokens.
    token_bytes: the bytes that each sampled token stands for.
    chats: how the prompts of each role are rendered.
    """

    annotate_stage: Stage = Stage.REFLECT  # counts the time of `annotate`; streamed, sampling does

    def __init__(
        self, config: Config, model: LoadedModel, token_bytes: TokenBytes, chats: Chats
    ) -> None:
        self.config = config
        self.model = model
        self.token_bytes = token_bytes
        self.chats = chats

    @classmethod  # noqa: B027
    def check_options(cls, config: Config) -> None:
        """Raise UserError for options that do not fit the method. Runs before a model is loaded."""

    @property
    def needs_teacher_engine(self) -> bool:
        """Whether text is generated with the teacher's weights (`Engines.teacher`)."""
        return False

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
