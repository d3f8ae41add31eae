"""The placeholders that a prompt template must have and may have."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.config import ReflectConfig, SelectConfig, TeacherConfig
from rosd_fast.config.templates import check_templates, without_reflection
from rosd_fast.errors import UserError


def test_default_templates_pass() -> None:
    check_templates(ReflectConfig(), TeacherConfig())
    check_templates(ReflectConfig(show_answer=True), TeacherConfig())


def test_placeholders_that_may_be_left_out() -> None:
    plain = ReflectConfig(wrong_template="{rollout} {problem}", answer_note="")
    check_templates(plain, TeacherConfig(wrong_template="{explanation} {problem}"))
    reference: Any = {
        "wrong_template": "{problem} {demonstration} {feedback} {explanation}",
        "correct_template": "{problem} {demonstration} {explanation}",
    }
    check_templates(plain, TeacherConfig(**reference))
    check_templates(plain, TeacherConfig(**reference, show_feedback=True))


@pytest.mark.parametrize(
    ("reflect_options", "teacher_options", "message"),
    [
        ({"wrong_template": "{problem} {rolout}"}, {}, r"^reflect\.wrong_template: .*\{rolout\}"),
        ({"wrong_template": "{problem}"}, {}, r"^reflect\.wrong_template: lacks .*\{rollout\}"),
        ({"correct_template": "{rollout}"}, {}, r"^reflect\.correct_template: lacks .*\{problem\}"),
        (
            {"correct_template": "{problem}{rollout}{demonstration}"},
            {},
            r"^reflect\.correct_template: .*unknown placeholder \{demonstration\}",
        ),
        ({"answer_note": "{solution}"}, {}, r"^reflect\.answer_note: .*\{solution\}.*\{answer\}"),
        ({"answer_note": "No.", "show_answer": True}, {}, r"^reflect\.answer_note: lacks"),
        (
            {"wrong_template": "{problem}{rollout}", "show_answer": True},
            {},
            r"^reflect\.wrong_template: lacks the placeholder \{answer_note\}",
        ),
        (
            {},
            {"wrong_template": "{problem}{quote}"},
            r"^teacher\.wrong_template: .*\{explanation\}",
        ),
        (
            {},
            {"correct_template": "{problem}{explanation}{quote}"},
            r"^teacher\.correct_template: has an unknown placeholder \{quote\}",
        ),
        (
            {},
            {"correct_template": "{problem}{explanation}{feedback}"},
            r"^teacher\.correct_template: has an unknown placeholder \{feedback\}",
        ),
        ({}, {"show_feedback": True}, r"^teacher\.wrong_template: lacks .*\{feedback\}"),
    ],
)
def test_bad_templates(
    reflect_options: dict[str, Any], teacher_options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_templates(ReflectConfig(**reflect_options), TeacherConfig(**teacher_options))


def test_a_teacher_without_a_reflection_keeps_the_rest() -> None:
    template = "{problem} {x}\n<a>\n{demonstration}\n</a>\nWrong: {quote}.\n{explanation} End."
    assert without_reflection(template) == (
        "{problem} {x}\n<a>\n{demonstration}\n</a>\nWrong: .\n End."
    )
    # It may also have a template of its own.
    own = TeacherConfig(wrong_template="{problem} Think.", correct_template="{problem} Think.")
    check_templates(ReflectConfig(control="none"), own)
    with pytest.raises(UserError, match=r"^teacher\.wrong_template: lacks .*\{explanation\}"):
        check_templates(ReflectConfig(), own)


def test_the_right_answer_needs_a_place_in_the_reflectors_prompt_alone() -> None:
    answer = SelectConfig(on_no_success="answer")
    check_templates(ReflectConfig(), TeacherConfig(), answer)
    note = ReflectConfig(wrong_template="{problem}{rollout}{answer_note}")
    check_templates(note, TeacherConfig(), answer)
    sentence = ReflectConfig(wrong_template="{problem}{rollout}", mode="sentence")
    check_templates(sentence, TeacherConfig(), answer)
    nowhere = ReflectConfig(wrong_template="{problem}{rollout}")
    with pytest.raises(UserError, match=r"^reflect\.wrong_template: has no place for the right"):
        check_templates(nowhere, TeacherConfig(), answer)
    with pytest.raises(UserError, match=r"^reflect\.answer_note: lacks .*\{answer\}"):
        check_templates(ReflectConfig(answer_note="Think."), TeacherConfig(), answer)
