"""Reflection: the model says where a wrong rollout goes wrong, and what makes a right one right.

    kept groups -> one request a rollout -> generations -> Reflection (quote, explanation)

A wrong rollout is shown beside a correct sibling, its demonstration. A prompt over the budget loses
the middle of the rollouts in it, never the problem or the instruction.

How the error is named is the mode: `verbatim`, a quote that cannot but be words of the rollout;
`sentence`, the number of one of its sentences, which are numbered in the prompt; `free`, a quote
as the model likes. The first two are grammars (`grammar.py`) that the engine enforces; the tag that
opens the reflection then ends the prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.reflection.filters import apply_filters
from rosd_fast.reflection.grammar import (
    explanation_grammar,
    opening_tag,
    sentence_grammar,
    verbatim_grammar,
)
from rosd_fast.reflection.parse import parse_reflection
from rosd_fast.text.prompts import (
    cut_middle,
    fill_template,
    fit_prompt,
    placeholders,
    render_prompt,
)
from rosd_fast.text.sentences import sentences
from rosd_fast.types import GenerationRequest, Reflection, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.config import ReflectConfig, TeacherConfig
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.types import Group, Problem, Rollout, Verdict

NUMBERED = re.compile(r"^\[(\d+)\] .*$", re.MULTILINE)
THINK_TAGS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReflectionTask:
    """What is asked of the reflector on one rollout."""

    rollout_id: str
    demonstration_id: str | None  # the correct sibling shown, None: none
    correct: bool  # whether the rollout reflected on is correct
    request: GenerationRequest
    prompt_cut: bool  # whether the middle of a rollout was left out
    opening: str = ""  # of the reflection, at the end of the prompt
    sentences: tuple[str, ...] = ()  # of the rollout, for mode sentence


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
        text = task.opening + tokenizer.decode(
            list(generation.completion_ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # it would change the spaces of a quote
        )
        parsed = parse_reflection(
            text,
            correct=task.correct,
            sentences=task.sentences if config.mode == "sentence" else None,
        )
        reflections[task.rollout_id] = Reflection(
            rollout_id=task.rollout_id,
            demonstration_id=task.demonstration_id,
            correct=task.correct,
            text=text,
            quote=parsed.quote,
            explanation=parsed.explanation,
            well_formed=parsed.well_formed,
            num_tokens=len(generation.completion_ids),
            sentence=parsed.sentence,
            mode=config.mode,
            prompt_cut=task.prompt_cut,
            tolerated=parsed.tolerated,
        )
    return apply_filters(reflections, groups, config)


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
    a demonstration and their group has none, or when nothing in them can be quoted. Raises
    UserError when a problem and the template alone are over `config.max_prompt_tokens`.
    """
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop_token_ids=tuple(stop_token_ids),
    )
    own_tokens = tokenizer.get_added_vocab()
    think = [tag for tag in THINK_TAGS if tag in own_tokens] if config.think else None
    tasks = []
    for group in groups:
        key = f"{seed}/{step}/{group.problem.id}"
        demonstration = choose_demonstration(group, verdicts, config.demonstration, key=key)
        for rollout in group.rollouts:
            correct = verdicts[rollout.id].success
            if correct and config.on_correct == "skip":
                continue
            template = template_of(config, correct=correct)
            texts, parts = {"rollout": rollout.text}, ()
            if config.mode == "sentence" and not correct:
                parts = split_sentences(rollout.text)
                texts["rollout"] = number_sentences(parts)
            shown = demonstration if "demonstration" in placeholders(template) else None
            if shown is not None:
                texts["demonstration"] = shown.text
            elif "demonstration" in placeholders(template):
                continue
            opening = opening_tag(config.mode, correct=correct, think=think)
            keep, prompt_ids = _prompt(group.problem, template, texts, opening, config, tokenizer)
            grammar = None
            if config.mode != "free":
                visible = cut_middle(texts["rollout"], keep)
                grammar = _grammar(rollout, visible, config, correct=correct, think=think)
                if grammar is None:
                    continue
            request = GenerationRequest(
                id=f"step{step}/reflect/{rollout.id}",
                prompt_ids=prompt_ids,
                params=params,
                seed=seed,
                grammar=grammar,
                affinity=group.problem.id,
            )
            tasks.append(
                ReflectionTask(
                    rollout_id=rollout.id,
                    demonstration_id=None if shown is None else shown.id,
                    correct=correct,
                    request=request,
                    prompt_cut=keep < max(map(len, texts.values())),
                    sentences=parts,
                    opening=opening,
                )
            )
    return tasks


def template_of(config: ReflectConfig, *, correct: bool) -> str:
    """The user turn for a rollout."""
    return getattr(config, template_name(config, correct=correct))


def template_name(config: ReflectConfig, *, correct: bool) -> str:
    """The option that holds the user turn for a rollout."""
    if correct:
        return "correct_template"
    return "sentence_template" if config.mode == "sentence" else "wrong_template"


def choose_demonstration(
    group: Group, verdicts: Mapping[str, Verdict], policy: str, *, key: str = ""
) -> Rollout | None:
    """The `first`, the `shortest` in tokens or a `random` correct rollout; None: there is none.

    Equal keys choose equally.
    """
    correct = [rollout for rollout in group.rollouts if verdicts[rollout.id].success]
    if policy == "shortest":
        correct.sort(key=lambda rollout: len(rollout.completion_ids))
    if policy == "random" and correct:
        return random.Random(key).choice(correct)
    return correct[0] if correct else None


def split_sentences(text: str) -> tuple[str, ...]:
    """The sentences of a rollout; sentence n is the one that `spans.locate_sentence(n)` finds."""
    data = text.encode(errors="replace")
    return tuple(data[first:last].decode() for first, last in sentences(data))


def number_sentences(parts: Sequence[str]) -> str:
    """One a line, as in "[1] Add the ones."; line breaks within one become spaces."""
    lines = (" ".join(part.split()) for part in parts)
    return "\n".join(f"[{number}] {line}" for number, line in enumerate(lines, start=1))


def _grammar(
    rollout: Rollout,
    visible: str,
    config: ReflectConfig,
    *,
    correct: bool,
    think: Sequence[str] | None,
) -> str | None:
    """What the reflection must look like; None where it could name nothing."""
    limits: dict[str, Any] = {"max_tokens": config.max_new_tokens, "think": think}
    if correct:
        return explanation_grammar(**limits)
    if config.mode == "verbatim":
        return verbatim_grammar(rollout.text, min_words=config.min_quote_words, **limits)
    return sentence_grammar([int(match[1]) for match in NUMBERED.finditer(visible)], **limits)


def _prompt(
    problem: Problem,
    template: str,
    texts: Mapping[str, str],
    opening: str,
    config: ReflectConfig,
    tokenizer: Any,
) -> tuple[int, tuple[int, ...]]:
    """(characters kept of each text, the prompt); as much of their middle is cut as need be."""
    note = (
        fill_template(config.answer_note, {"answer": problem.answer}) if config.show_answer else ""
    )

    def render(keep: int) -> tuple[int, ...]:
        values = {name: cut_middle(text, keep) for name, text in texts.items()}
        user = fill_template(template, {**values, "problem": problem.prompt, "answer_note": note})
        return render_prompt(tokenizer, user=user, system=problem.system, opening=opening)

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
    return fitted


def reflection_metrics(reflections: Mapping[str, Reflection]) -> dict[str, float]:
    """`reflect/num_reflections`, their mean length, and shares of them:

    well_formed_frac   with all tags
    tolerated_frac     read although a tag is missing or in another case
    truncated_frac     whose prompt lacks the middle of a rollout
    leak_frac          whose explanation states the final answer
    refused_frac       whose explanation is not used: it leaks, is empty, or is copied
    """
    count = len(reflections)
    metrics = {"reflect/num_reflections": float(count)}
    if not count:
        return metrics
    own = reflections.values()
    for name, number in (
        ("well_formed", sum(item.well_formed for item in own)),
        ("tolerated", sum(bool(item.tolerated) for item in own)),
        ("truncated", sum(item.prompt_cut for item in own)),
        ("leak", sum(item.leaks for item in own)),
        ("empty", sum(item.refused == "empty" for item in own)),
        ("copied", sum(item.refused == "copy" for item in own)),
        ("refused", sum(item.refused is not None for item in own)),
    ):
        metrics[f"reflect/{name}_frac"] = number / count
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
            "reflect.sentence_template",
            reflect.sentence_template,
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
