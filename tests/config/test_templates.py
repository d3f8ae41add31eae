"""The placeholders that a prompt template must have and may have."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.config import ReflectConfig, TeacherConfig
from rosd_fast.config.templates import check_templates
from rosd_fast.errors import UserError


def test_default_templates_pass() -> None:
    check_templates(ReflectConfig(), TeacherConfig())
    check_templates(ReflectConfig(show_answer=True), TeacherConfig())


def test_placeholders_that_may_be_left_out() -> None:
    plain = ReflectConfig(wrong_template="{rollout} {problem}", answer_note="")
    check_templates(plain, TeacherConfig(wrong_template="{explanation} {problem}"))


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
    ],
)
def test_bad_templates(
    reflect_options: dict[str, Any], teacher_options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_templates(ReflectConfig(**reflect_options), TeacherConfig(**teacher_options))
