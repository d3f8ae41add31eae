"""ROSD, reflective on-policy self-distillation (arXiv 2605.28014).

    annotate   the model reflects: it quotes the first error of a rollout and explains it
    build      the quote becomes a range of sampled tokens; the teacher prompt shows the explanation
    measure    does the teacher answer better with a reflection in its prompt?

Wrong rollouts are trained from the located error on, correct ones whole. Options: `reflect`, `span`
and `teacher`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.batch.samples import build_samples, sample_metrics
from rosd_fast.config import Config, uses_teacher_weights
from rosd_fast.config.templates import check_templates
from rosd_fast.engines.local.grammar_mask import GrammarCompiler
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.budgets import check_budgets
from rosd_fast.model.head import head
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.reflection.probe import probe_metrics, teacher_helps, wrong_samples
from rosd_fast.reflection.reflect import reflect, reflection_metrics
from rosd_fast.reflection.requests import template_name
from rosd_fast.report.stages import Stage
from rosd_fast.rollout.sample import sampling_params
from rosd_fast.rollout.siblings import choose_demonstration

if TYPE_CHECKING:
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Group, Problem, Reflection, Verdict


class Rosd(Method):
    """Distills each rollout from its first error on, from a teacher that has read a reflection."""

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError for a template with a wrong or a missing placeholder."""
        super().check_options(config)
        check_templates(config.reflect, config.teacher)

    @property
    def needs_teacher_engine(self) -> bool:
        """Whether reflections or probes are written with the teacher's weights."""
        return uses_teacher_weights(self.config)

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raise UserError when the longest problem fills a template's budget, or when quotes
        cannot be constrained with this tokenizer."""
        longest = max(problems, key=lambda problem: len(problem.prompt))
        check_budgets(self.config, self.chats, longest, used_templates(self.config))
        if self.config.reflect.mode != "free":
            vocab_size = head(self.model.model).weight.shape[0]
            GrammarCompiler(self.model.tokenizer, vocab_size).check(self.model.stop_token_ids)

    async def annotate(
        self,
        step: int,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        engines: Engines,
        progress: Progress | Hidden,
    ) -> dict[str, Reflection]:
        """Return the model's reflections on the rollouts of `groups`, by rollout id."""
        config = self.config
        engine = engines.student if config.reflect.weights == "student" else engines.teacher
        assert engine is not None  # `needs_teacher_engine` has asked for it
        return await reflect(
            groups,
            verdicts,
            engine=engine,
            config=config.reflect,
            chats=self.chats,
            stop_token_ids=self.model.stop_token_ids,
            seed=config.seed,
            step=step,
            on_tokens=progress.tokens,
            cut_right=config.compat.cut_prompts_right,
        )

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Locate each quote in the sampled tokens, and put both prompts before them."""
        thinks = self.config.span.thinking
        with progress.stage(Stage.LOCATE):
            located = locate_errors(
                groups,
                verdicts,
                annotations,
                token_bytes=self.token_bytes,
                config=self.config.span,
                reencode_with=self.model.tokenizer if self.config.compat.reencode_span else None,
                thinking={} if thinks else self.chats.thinking_lengths(groups),
            )
        with progress.stage(Stage.BUILD):
            samples = build_samples(
                groups,
                annotations,
                located.spans,
                chat=self.chats.teacher,
                config=self.config.teacher,
                demonstrations=self._demonstrations(groups, verdicts, annotations),
                cut_right=self.config.compat.cut_prompts_right,
            )
        return self.training_set(
            samples,
            located.spans,
            groups,
            verdicts,
            {**reflection_metrics(annotations), **sample_metrics(samples), **located.metrics()},
        )

    def _demonstrations(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
    ) -> dict[str, str]:
        """The correct sibling that the teacher may read, by rollout id; a rollout never reads
        itself."""
        texts = {}
        for group in groups:
            own = {rollout.id: rollout for rollout in group.rollouts}
            for rollout in group.rollouts:
                reflection = annotations.get(rollout.id)
                if reflection is not None and reflection.demonstration_id is not None:
                    sibling = own[reflection.demonstration_id]
                else:
                    sibling = choose_demonstration(
                        group,
                        verdicts,
                        self.config.reflect.demonstration,
                        key=f"{self.config.seed}/{rollout.id}",
                        exclude=rollout.id,
                        chats=self.chats,
                    )
                if sibling is not None:
                    texts[rollout.id] = self.chats.shown(sibling)[0]
        return texts

    async def measure(
        self,
        step: int,
        training: TrainingSet,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        engines: Engines,
        progress: Progress | Hidden,
    ) -> dict[str, float]:
        """Return the probe's scores, in the steps that `reflect.probe_every` names."""
        options = self.config.reflect
        if options.probe_every == 0 or step % options.probe_every:
            return {}
        assert engines.teacher is not None
        with progress.stage(Stage.PROBE):
            helped = await teacher_helps(
                engines.teacher,
                wrong_samples(training.samples, verdicts, options.probe_problems),
                groups,
                verdicts,
                tokenizer=self.model.tokenizer,
                params=sampling_params(self.config.sample, self.model.stop_token_ids),
                seed=self.config.seed,
                step=step,
            )
        return probe_metrics(helped)


def used_templates(config: Config) -> list[tuple[str, str]]:
    """Return (section, option) of the user turns of the reflector and of the teacher."""
    used = [
        ("reflect", template_name(config.reflect, correct=False)),
        ("teacher", "wrong_template"),
    ]
    if config.reflect.on_correct == "reflect":
        used += [
            ("reflect", template_name(config.reflect, correct=True)),
            ("teacher", "correct_template"),
        ]
    return used
