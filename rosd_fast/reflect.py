"""Reflection: the model says where a wrong rollout goes wrong, and what makes a right one right.

    kept groups -> one request a rollout -> generations -> Reflection (quote, explanation)

A wrong rollout is shown beside a correct sibling, its demonstration. A prompt over the budget loses
the middle of the rollouts in it, never the problem or the instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.prompts import cut_middle, fill_template, fit_prompt, placeholders, render_prompt
from rosd_fast.types import GenerationRequest, Reflection, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.config import ReflectConfig, TeacherConfig
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.types import Group, Problem, Rollout, Verdict

QUOTE = re.compile(r"<error_quote>(.*?)</error_quote>", re.IGNORECASE | re.DOTALL)
EXPLANATION = re.compile(r"<explanation>(.*?)(</explanation>|\Z)", re.IGNORECASE | re.DOTALL)
CLOSING = "</explanation>"
CUT_TAG = re.compile(  # a closing tag that the length limit cut
    f"({'|'.join(CLOSING[:length] for length in range(len(CLOSING) - 1, 1, -1))})\\Z", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReflectionTask:
    """What is asked of the reflector on one rollout."""

    rollout_id: str
    demonstration_id: str | None  # the correct sibling shown, None: none
    correct: bool  # whether the rollout reflected on is correct
    request: GenerationRequest


async def reflect(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    *,
    engine: RolloutEngine,
    config: ReflectConfig,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    seed: int,
    step: int,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, Reflection]:
    """Reflections on the rollouts of `groups` (those that were kept), by rollout id.

    Raises UserError as `build_reflection_requests` and the engine do, and ValueError when the
    engine's completions are not those asked for.
    """
    tasks = build_reflection_requests(
        groups,
        verdicts,
        config=config,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        seed=seed,
        step=step,
    )
    if not tasks:
        return {}
    generations = await engine.generate([task.request for task in tasks], on_tokens=on_tokens)
    if [generation.request_id for generation in generations] != [task.request.id for task in tasks]:
        raise ValueError(
            f"the engine's completions are not, in order, those of {len(tasks)} requests"
        )
    reflections = {}
    for task, generation in zip(tasks, generations, strict=True):
        text = tokenizer.decode(
            list(generation.completion_ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # it would change the spaces of a quote
        )
        quote, explanation, well_formed = parse_reflection(text, correct=task.correct)
        reflections[task.rollout_id] = Reflection(
            rollout_id=task.rollout_id,
            demonstration_id=task.demonstration_id,
            correct=task.correct,
            text=text,
            quote=quote,
            explanation=explanation,
            well_formed=well_formed,
            num_tokens=len(generation.completion_ids),
        )
    return reflections


def build_reflection_requests(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    *,
    config: ReflectConfig,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    seed: int,
    step: int,
) -> list[ReflectionTask]:
    """One task a rollout, in order.

    Correct rollouts have none when `config.on_correct` is skip, wrong ones when the template shows
    a demonstration and their group has none. Raises UserError when a problem and the template alone
    are over `config.max_prompt_tokens`.
    """
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop_token_ids=tuple(stop_token_ids),
    )
    tasks = []
    for group in groups:
        demonstration = choose_demonstration(group, verdicts, config.demonstration)
        for rollout in group.rollouts:
            correct = verdicts[rollout.id].success
            if correct and config.on_correct == "skip":
                continue
            template = config.correct_template if correct else config.wrong_template
            texts = {"rollout": rollout.text}
            shown = demonstration if "demonstration" in placeholders(template) else None
            if shown is not None:
                texts["demonstration"] = shown.text
            elif "demonstration" in placeholders(template):
                continue
            request = GenerationRequest(
                id=f"step{step}/reflect/{rollout.id}",
                prompt_ids=_prompt(group.problem, template, texts, config, tokenizer),
                params=params,
                seed=seed,
            )
            tasks.append(
                ReflectionTask(
                    rollout_id=rollout.id,
                    demonstration_id=None if shown is None else shown.id,
                    correct=correct,
                    request=request,
                )
            )
    return tasks


def choose_demonstration(
    group: Group, verdicts: Mapping[str, Verdict], policy: str
) -> Rollout | None:
    """The `first` or the `shortest` correct rollout, in tokens; None: there is none."""
    correct = [rollout for rollout in group.rollouts if verdicts[rollout.id].success]
    if policy == "shortest":
        correct.sort(key=lambda rollout: len(rollout.completion_ids))
    return correct[0] if correct else None


def _prompt(
    problem: Problem,
    template: str,
    texts: Mapping[str, str],
    config: ReflectConfig,
    tokenizer: Any,
) -> tuple[int, ...]:
    """The prompt, the middle of `texts` cut as far as the budget asks for."""
    note = (
        fill_template(config.answer_note, {"answer": problem.answer}) if config.show_answer else ""
    )

    def render(keep: int) -> tuple[int, ...]:
        values = {name: cut_middle(text, keep) for name, text in texts.items()}
        user = fill_template(template, {**values, "problem": problem.prompt, "answer_note": note})
        return render_prompt(tokenizer, user=user, system=problem.system)

    fitted = fit_prompt(
        render,
        longest=max(map(len, texts.values()), default=0),
        max_tokens=config.max_prompt_tokens,
    )
    if fitted is None:
        raise UserError(
            f"the reflection prompt has {len(render(0))} tokens without any rollout, over the "
            f"budget of {config.max_prompt_tokens}",
            where=f"problem {problem.id}",
            fix="Raise reflect.max_prompt_tokens, or leave the problem out",
        )
    return fitted[1]


def parse_reflection(text: str, *, correct: bool) -> tuple[str | None, str | None, bool]:
    """The quote, the explanation, and whether every tag is there, in order and not empty.

    Whitespace around both is dropped; what is empty is None. Tags may be in any case. An
    explanation whose closing tag is missing runs to the end of the text. On correct rollouts no
    quote is asked for or read.
    """
    quoted = None if correct else QUOTE.search(text)
    # An explanation before the quote, or one that the quote itself speaks of, is second choice.
    explained = EXPLANATION.search(text, quoted.end() if quoted else 0)
    in_order = explained is not None and (correct or quoted is not None)
    if explained is None and quoted is not None:
        explained = EXPLANATION.search(text[: quoted.start()])
    quote = quoted[1].strip() if quoted else ""
    explanation = closing = ""
    if explained is not None:
        closing = explained[2]
        explanation = (explained[1] if closing else CUT_TAG.sub("", explained[1])).strip()
    well_formed = bool(in_order and closing and explanation and (correct or quote))
    return quote or None, explanation or None, well_formed


def reflection_metrics(reflections: Mapping[str, Reflection]) -> dict[str, float]:
    """`reflect/num_reflections`, their share that is well formed, and their mean length."""
    count = len(reflections)
    metrics = {"reflect/num_reflections": float(count)}
    if count:
        own = reflections.values()
        metrics["reflect/well_formed_frac"] = sum(item.well_formed for item in own) / count
        metrics["reflect/tokens_mean"] = sum(item.num_tokens for item in own) / count
    return metrics


def check_templates(reflect: ReflectConfig, teacher: TeacherConfig) -> None:
    """Raise UserError for a template with an unknown placeholder, or without a needed one."""
    answer = {"answer"} if reflect.show_answer else set()
    note = {"answer_note"} if reflect.show_answer else set()
    for option, template, needed, allowed in (
        (
            "reflect.wrong_template",
            reflect.wrong_template,
            {"problem", "rollout"} | note,
            {"demonstration", "answer_note"},
        ),
        (
            "reflect.correct_template",
            reflect.correct_template,
            {"problem", "rollout"},
            {"answer_note"},
        ),
        ("reflect.answer_note", reflect.answer_note, answer, {"answer"}),
        ("teacher.wrong_template", teacher.wrong_template, {"problem", "explanation"}, {"quote"}),
        ("teacher.correct_template", teacher.correct_template, {"problem", "explanation"}, set()),
    ):
        found = placeholders(template)
        known = needed | allowed
        if unknown := sorted(found - known):
            raise UserError(
                f"has an unknown placeholder {{{unknown[0]}}}",
                where=option,
                fix=f"It may have {_listed(known)}",
            )
        if missing := sorted(needed - found):
            raise UserError(
                f"lacks the placeholder {{{missing[0]}}}",
                where=option,
                fix=f"It must have {_listed(needed)}",
            )


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
