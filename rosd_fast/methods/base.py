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

The first four need nothing but a file beside `rosd.py`. The last two train without a teacher: they
add a sample whose `teacher_prompt_ids` is empty, and a loss for it in `rosd_fast.trainer.loss`.
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
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import DistillSample, ErrorSpan, Group, Problem, Reflection, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What a step trains on, as `Method.build` returns it.

    samples: at most one per rollout; the order decides nothing.
    spans: the trained tokens by rollout id, for the report; a rollout without one is not trained.
    metrics: of the method's own stages, with names such as `reflect/num_reflections`.
    """

    samples: Sequence[DistillSample]
    spans: Mapping[str, ErrorSpan] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Method(ABC):
    """Turns verified rollouts into training samples.

    config: all options; a method documents the sections that it reads.
    model: the student as loaded, with its tokenizer and stop tokens.
    token_bytes: the bytes that each sampled token stands for.
    """

    annotate_stage: Stage = Stage.REFLECT  # the stage that the time of `annotate` is counted under

    def __init__(self, config: Config, model: LoadedModel, token_bytes: TokenBytes) -> None:
        self.config = config
        self.model = model
        self.token_bytes = token_bytes

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
        """Return what the kept `groups` of a step train, given what `annotate` returned."""

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
