"""Distillation samples: each rollout under the student's prompt and under the teacher's.

The student's prompt is the prompt that the rollout was sampled from. The teacher's prompt is the
same problem with the reflection. Both are followed by the sampled completion ids; text is never
re-tokenized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.text.prompts import (
    cut_middle,
    fill_known,
    fill_template,
    fit_prompt,
    placeholders,
)
from rosd_fast.text.sizes import encoded_size
from rosd_fast.types import TrainSample

if TYPE_CHECKING:
    from rosd_fast.config import TeacherConfig
    from rosd_fast.text.chat import ChatFormat
    from rosd_fast.types import ErrorSpan, Group, Problem, Reflection, Rollout


def build_samples(
    groups: Sequence[Group],
    reflections: Mapping[str, Reflection],
    spans: Mapping[str, ErrorSpan],
    *,
    chat: ChatFormat,
    config: TeacherConfig,
    demonstrations: Mapping[str, str] | None = None,
    feedback: Mapping[str, str] | None = None,
    cut_right: bool = False,
) -> list[TrainSample]:
    """One sample per rollout that has a span and every text that its teacher template uses.

    demonstrations: by rollout id, the solution that the teacher reads, where there is one.
    feedback: by rollout id, what the verifier says, which replaces {feedback}.
    cut_right: as for `teacher_prompt`.

    Raises UserError if a problem and the template alone exceed `config.max_prompt_tokens`.
    """
    siblings, feedback = demonstrations or {}, feedback or {}
    samples = []
    for problem, rollout in _rollouts(groups):
        reflection, span = reflections.get(rollout.id), spans.get(rollout.id)
        if reflection is None or span is None:
            continue
        template = teacher_template(
            problem, config.correct_template if reflection.correct else config.wrong_template
        )
        texts = {"explanation": reflection.explanation, "quote": reflection.quote}
        texts = {name: text for name, text in texts.items() if name in placeholders(template)}
        present = {name: text for name, text in texts.items() if text}
        if len(present) < len(texts):
            continue  # such as a reflection without a quote under on_miss = "full"
        if "demonstration" in placeholders(template):
            shown = {"demonstration": siblings.get(rollout.id, "")}
            note = fill_template(config.demonstration_note, shown)
            present["demonstration"] = note if rollout.id in siblings else ""
        if "feedback" in placeholders(template):
            present["feedback"] = feedback.get(rollout.id, "")
        prompt_ids, cut = teacher_prompt(
            problem,
            template,
            present,
            chat=chat,
            max_tokens=config.max_prompt_tokens,
            cut_right=cut_right,
        )
        samples.append(sample_of(rollout, span, teacher_prompt_ids=prompt_ids, reflection_cut=cut))
    return samples


def teacher_template(problem: Problem, template: str) -> str:
    """The user turn of the teacher: the problem's own, else `template`."""
    return problem.teacher_prompt or template


def sample_of(rollout: Rollout, span: ErrorSpan, **loss: Any) -> TrainSample:
    """The sample of a rollout's tokens in `span`; `loss` is the fields that name and weigh it."""
    return TrainSample(
        rollout_id=rollout.id,
        problem_id=rollout.problem_id,
        student_prompt_ids=rollout.prompt_ids,
        completion_ids=rollout.completion_ids,
        logprobs=rollout.logprobs,
        start=span.start,
        end=span.end,
        **loss,
    )


def teacher_prompt(
    problem: Problem,
    template: str,
    texts: Mapping[str, str],
    *,
    chat: ChatFormat,
    max_tokens: int,
    cut_right: bool = False,
) -> tuple[tuple[int, ...], bool]:
    """The teacher's prompt, and whether the reflection was cut to fit.

    Each text is cut to the same number of characters: an explanation loses its end, a quote its
    middle. Raises UserError if the prompt exceeds `max_tokens` even without them.

    cut_right: cut the last ids of the prompt instead, as the public code does (a known bug).
    """

    def render(keep: int) -> tuple[int, ...]:
        values = {
            name: text[:keep] if name == "explanation" else cut_middle(text, keep)
            for name, text in texts.items()
        }
        user = fill_known(template, {**values, "problem": problem.prompt})
        return chat.render_problem(problem, user)

    longest = max(map(len, texts.values()), default=0)
    ids = render(longest)
    if cut_right or len(ids) <= max_tokens:
        return ids[:max_tokens], len(ids) > max_tokens
    sizes = {name: encoded_size(chat.tokenizer, text) for name, text in texts.items()}

    def size(keep: int) -> int:
        return sum(
            size.head(keep) if name == "explanation" else size.middle_cut(keep)
            for name, size in sizes.items()
        )

    fitted = fit_prompt(render, longest=longest, max_tokens=max_tokens, size=size)
    if fitted is None:
        raise UserError(
            f"the teacher prompt has {len(render(0))} tokens without any reflection, more than "
            f"the budget of {max_tokens}",
            where=f"problem {problem.id}",
            fix="Raise teacher.max_prompt_tokens, or leave the problem out",
        )
    keep, prompt_ids = fitted
    return prompt_ids, keep < longest


def sample_metrics(samples: Sequence[TrainSample]) -> dict[str, float]:
    """`reflect/cut_frac`: the share of samples whose reflection was cut to fit."""
    if not samples:
        return {}
    return {"reflect/cut_frac": sum(sample.reflection_cut for sample in samples) / len(samples)}


def _rollouts(groups: Sequence[Group]) -> Iterator[tuple[Problem, Rollout]]:
    for group in groups:
        for rollout in group.rollouts:
            yield group.problem, rollout
