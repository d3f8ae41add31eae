"""Samples: the rollout's own ids under both prompts."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.batch.samples import build_samples, sample_metrics
from rosd_fast.config import TeacherConfig
from rosd_fast.errors import UserError
from rosd_fast.text.chat import chat_format
from rosd_fast.text.prompts import ELLIPSIS
from rosd_fast.types import ErrorSpan, Reflection

WRONG = "{problem}\nWrong: {quote}\n{explanation}\nSolve."
CORRECT = "{problem}\nHint: {explanation}\nSolve."


def reflect_on(rollout_id, *, correct=False, quote=None, explanation=None):
    return Reflection(
        rollout_id=rollout_id,
        demonstration_id=None,
        correct=correct,
        text="",
        quote=quote,
        explanation=explanation,
        well_formed=True,
        num_tokens=1,
    )


@pytest.fixture(scope="module")
def group(make_group):
    return make_group(["2 + 2 = 5", "2 + 2 = 4", "so 6"], [0.0, 1.0, 0.0], system="Be brief.")[0]


def build(tokenizer, group, reflections, *, spans=None, siblings=None, cut_right=False, **options):
    templates: dict[str, Any] = {"wrong_template": WRONG, "correct_template": CORRECT}
    if spans is None:
        spans = [
            ErrorSpan(rollout_id=reflection.rollout_id, start=1, end=3, source="quote")
            for reflection in reflections
        ]
    return build_samples(
        [group],
        {reflection.rollout_id: reflection for reflection in reflections},
        {span.rollout_id: span for span in spans},
        chat=chat_format(tokenizer),
        config=TeacherConfig(**(templates | options)),
        demonstrations=siblings,
        cut_right=cut_right,
    )


def test_samples(tokenizer, group):
    samples = build(
        tokenizer,
        group,
        [
            reflect_on("p0/1", correct=True, explanation="Count {quote}."),
            reflect_on("p0/0", quote="= 5", explanation="It is {problem}4."),
        ],
    )
    assert [sample.rollout_id for sample in samples] == ["p0/0", "p0/1"]
    for sample, rollout in zip(samples, group.rollouts, strict=False):
        assert sample.completion_ids == rollout.completion_ids
        assert sample.logprobs == rollout.logprobs
        assert sample.student_prompt_ids == rollout.prompt_ids
        assert (sample.start, sample.end, sample.weight) == (1, 3, 1.0)
        assert not sample.reflection_cut
    head = "<|system|>Be brief.<|end|><|user|>2 + 2 = ?\n"
    assert [tokenizer.decode(sample.teacher_prompt_ids) for sample in samples] == [
        f"{head}Wrong: = 5\nIt is {{problem}}4.\nSolve.<|end|><|assistant|>",
        f"{head}Hint: Count {{quote}}.\nSolve.<|end|><|assistant|>",
    ]
    assert sample_metrics(samples) == {"reflect/cut_frac": 0.0}


def test_what_is_left_out(tokenizer, group):
    whole = reflect_on("p0/0", quote="= 5", explanation="It is 4.")
    assert build(tokenizer, group, [whole], spans=[]) == []
    span = ErrorSpan(rollout_id="p0/0", start=0, end=1, source="full")
    assert build(tokenizer, group, [], spans=[span]) == []
    assert build(tokenizer, group, [reflect_on("p0/0", quote="= 5")], spans=[span]) == []
    unquoted = [reflect_on("p0/0", explanation="It is 4.")]
    assert build(tokenizer, group, unquoted) == []
    assert len(build(tokenizer, group, unquoted, wrong_template=CORRECT)) == 1
    assert sample_metrics([]) == {}


@pytest.mark.parametrize("budget", [60, 90])
def test_over_the_budget_the_explanation_loses_its_end(tokenizer, group, budget):
    explanation = "The correct idea: " + "add the ones first. " * 40
    samples = build(
        tokenizer,
        group,
        [
            reflect_on("p0/0", quote="= 5", explanation=explanation),
            reflect_on("p0/1", correct=True, explanation="Count."),
        ],
        max_prompt_tokens=budget,
    )
    long, short = samples
    assert long.teacher_prompt_ids is not None
    assert budget - 4 <= len(long.teacher_prompt_ids) <= budget
    prompt = tokenizer.decode(long.teacher_prompt_ids)
    head, tail = (
        "<|system|>Be brief.<|end|><|user|>2 + 2 = ?\nWrong: = 5\n",
        "\nSolve.<|end|><|assistant|>",
    )
    assert prompt.startswith(head) and prompt.endswith(tail)
    kept = prompt.removeprefix(head).removesuffix(tail)
    assert explanation.startswith(kept) and len(kept) > 20
    assert (long.reflection_cut, short.reflection_cut) == (True, False)
    assert sample_metrics(samples) == {"reflect/cut_frac": 0.5}


def test_the_public_code_cuts_the_end_of_the_prompt(tokenizer, group):
    """The explanation loses its end, and the generation prompt is gone."""
    reflections = [reflect_on("p0/0", quote="= 5", explanation="add the ones first. " * 40)]
    (whole,) = build(tokenizer, group, reflections)
    (cut,) = build(tokenizer, group, reflections, max_prompt_tokens=60, cut_right=True)
    assert whole.teacher_prompt_ids is not None
    assert cut.teacher_prompt_ids == whole.teacher_prompt_ids[:60] and cut.reflection_cut
    (fits,) = build(tokenizer, group, reflections, cut_right=True)
    assert fits == whole


def test_the_teacher_may_read_a_correct_sibling(tokenizer, group):
    options: Any = {
        "wrong_template": "{problem}{demonstration}\n{explanation}",
        "correct_template": "{problem}{demonstration}\n{explanation}",
        "demonstration_note": "\nRight: {demonstration}",
    }
    reflections = [
        reflect_on("p0/0", explanation="Add."),
        reflect_on("p0/1", correct=True, explanation="Count."),
    ]
    samples = build(tokenizer, group, reflections, siblings={"p0/0": "2 + 2 = 4"}, **options)
    first, second = (tokenizer.decode(sample.teacher_prompt_ids) for sample in samples)
    assert "<|user|>2 + 2 = ?\nRight: 2 + 2 = 4\nAdd.<|end|>" in first
    assert "<|user|>2 + 2 = ?\nCount.<|end|>" in second


def test_a_quote_as_long_as_the_rollout_does_not_end_the_run(tokenizer, group):
    quote = "first " + "we add the ones " * 60 + "last"
    (sample,) = build(
        tokenizer,
        group,
        [reflect_on("p0/0", quote=quote, explanation="It is 4.")],
        max_prompt_tokens=70,
    )
    assert sample.teacher_prompt_ids is not None
    prompt = tokenizer.decode(sample.teacher_prompt_ids)
    assert len(sample.teacher_prompt_ids) <= 70 and sample.reflection_cut
    assert "Wrong: first" in prompt and ELLIPSIS in prompt and "last\nIt is 4.\nSolve." in prompt


def test_a_problem_over_the_budget_is_a_user_error(tokenizer, group):
    reflections = [reflect_on("p0/0", quote="= 5", explanation="It is 4.")]
    with pytest.raises(UserError, match=r"problem p0: .*budget of 20.*teacher\.max_prompt_tokens"):
        build(tokenizer, group, reflections, max_prompt_tokens=20)
