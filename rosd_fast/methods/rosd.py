"""ROSD, reflective on-policy self-distillation (arXiv 2605.28014).

    annotate   the model reflects: it quotes the first error of a rollout and explains it
    build      the quote becomes a range of sampled tokens; the teacher prompt shows the explanation
    measure    does the teacher answer better with a reflection in its prompt?

Wrong rollouts are trained from the located error on, correct ones whole. Options: `reflect`, `span`
and `teacher`; `reflect.control` and `span.control` are the control arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rosd_fast.batch.samples import build_samples, sample_metrics, teacher_template
from rosd_fast.config import Config, uses_teacher_weights
from rosd_fast.config.templates import check_templates
from rosd_fast.engines.local.grammar_mask import GrammarCompiler
from rosd_fast.engines.local.token_view import check_served
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.budgets import check_budgets, check_references
from rosd_fast.methods.targets import NO_DEMONSTRATION
from rosd_fast.model.head import head
from rosd_fast.reflection.control import Arm, apply_control
from rosd_fast.reflection.grammar import check_spelling
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.reflection.probe import probe_metrics, teacher_helps, wrong_samples
from rosd_fast.reflection.reflect import reflect, reflection_metrics
from rosd_fast.reflection.requests import template_name
from rosd_fast.report.stages import Stage
from rosd_fast.rollout.sample import sampling_params
from rosd_fast.rollout.siblings import demonstrate
from rosd_fast.text.prompts import placeholders

if TYPE_CHECKING:
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Group, Problem, Reflection, TrainSample, Verdict


class Rosd(Method):
    """Distills each rollout from its first error on, from a teacher that has read a reflection."""

    has_reflections = True
    reads = (
        "reflect.*",
        "span.*",
        "select.on_*",
        "teacher.wrong_template",
        "teacher.correct_template",
        "teacher.demonstration_note",
        "teacher.show_feedback",
    )

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError for a template with a wrong or a missing placeholder."""
        super().check_options(config)
        check_templates(config.reflect, config.teacher, config.select)

    @property
    def needs_teacher_engine(self) -> bool:
        """Whether reflections or probes are written with the teacher's weights."""
        return uses_teacher_weights(self.config)

    def check_problem(self, problem: Problem) -> None:
        """Raise UserError when the problem fills a template's budget."""
        check_budgets(self.config, self.chats, problem, used_templates(self.config))

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raise UserError when the longest problem fills a template's budget, when quotes cannot be
        constrained with this tokenizer, or when reference solutions are asked for and missing."""
        self.check_problem(max(problems, key=lambda problem: len(problem.prompt)))
        check_references(self.config, problems)
        if self.config.reflect.mode != "free" and self.config.reflect.control != "none":
            tokenizer, stop_token_ids = self.model.tokenizer, self.model.stop_token_ids
            if self.config.engine.kind == "sglang":
                check_served(tokenizer, stop_token_ids)
            vocab_size = head(self.model.model).weight.shape[0]
            GrammarCompiler(tokenizer, vocab_size).check(stop_token_ids)
            check_spelling(self.token_bytes)

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
        if config.reflect.control == "none":
            return {}
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
            on_no_success=config.select.on_no_success,
            on_tokens=progress.tokens,
            cut_right=config.compat.cut_prompts_right,
            token_bytes=self.token_bytes,
        )

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Locate each quote in the sampled tokens, and put both prompts before them."""
        config = self.config
        thinking = {} if config.span.thinking else self.chats.thinking_lengths(groups)
        with progress.stage(Stage.LOCATE):
            located = locate_errors(
                groups,
                verdicts,
                annotations,
                token_bytes=self.token_bytes,
                config=config.span,
                reencode_with=self.model.tokenizer if config.compat.reencode_span else None,
                thinking=thinking,
            )
            arm = apply_control(
                groups, verdicts, annotations, located.spans, config, thinking=thinking
            )
            located = replace(located, spans=arm.spans)
        with progress.stage(Stage.BUILD):
            shown = self._demonstrations(groups, verdicts, annotations, arm)
            feedback = {}
            if config.teacher.show_feedback:
                feedback = {
                    rollout.id: group.problem.feedback_on(verdicts[rollout.id])
                    for group in groups
                    for rollout in group.rollouts
                }
            samples = build_samples(
                groups,
                arm.reflections,
                arm.spans,
                chat=self.chats.teacher,
                config=arm.templates,
                demonstrations={name: text for name, text in shown.items() if text},
                feedback=feedback,
                cut_right=config.compat.cut_prompts_right,
            )
            if config.span.control == "negative":
                samples = [
                    sample if verdicts[sample.rollout_id].success else self._punished(sample)
                    for sample in samples
                ]
        metrics = {
            **reflection_metrics(annotations),
            **sample_metrics(samples),
            **located.metrics(),
            **arm.metrics,
        }
        if shown:
            metrics[NO_DEMONSTRATION] = float(sum(not text for text in shown.values()))
        return self.training_set(samples, arm.spans, groups, verdicts, metrics)

    def _demonstrations(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        arm: Arm,
    ) -> dict[str, str]:
        """The correct solutions that the teacher reads, by rollout id; an empty one: there is none.

        Only rollouts with a span, and with a template that shows a solution, have an entry. A wrong
        rollout has the sibling that its reflector was shown.
        """
        config, shown = self.config, {}
        for group in groups:
            siblings = {rollout.id: rollout for rollout in group.rollouts}
            for rollout in group.rollouts:
                reflection = arm.reflections.get(rollout.id)
                if reflection is None or rollout.id not in arm.spans:
                    continue
                if "demonstration" not in placeholders(
                    teacher_template(group.problem, arm.template_of(reflection))
                ):
                    continue
                seen = annotations.get(rollout.id, reflection).demonstration_id
                if seen in siblings:
                    shown[rollout.id] = self.chats.shown(siblings[seen])[0]
                    continue
                found = demonstrate(
                    group,
                    rollout,
                    verdicts,
                    config.select,
                    config.reflect.demonstration,
                    key=f"{config.seed}/{rollout.policy_version}/{rollout.id}",
                    chats=self.chats,
                )
                shown[rollout.id] = "" if found is None else found.text
        return shown

    def _punished(self, sample: TrainSample) -> TrainSample:
        """The sample with advantage -1 in place of a teacher."""
        return replace(
            sample,
            teacher_prompt_ids=None,
            advantage=-1.0,
            weight=self.config.span.negative_weight,
        )

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
                verifiers=engines.verifiers,
                tokenizer=self.model.tokenizer,
                params=sampling_params(self.config.sample, self.model.stop_token_ids),
                seed=self.config.seed,
                step=step,
            )
        return probe_metrics(helped)


def used_templates(config: Config) -> list[tuple[str, str]]:
    """Return (section, option) of the user turns of the reflector and of the teacher.

    The reflector's are among them also where `reflect.control` none needs none, so that all arms
    accept the same problems.
    """
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
