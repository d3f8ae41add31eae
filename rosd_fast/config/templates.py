"""The placeholders that each prompt template must have and may have."""

from __future__ import annotations

from rosd_fast.config.schema import ReflectConfig, TeacherConfig
from rosd_fast.errors import UserError
from rosd_fast.text.prompts import placeholders


def check_templates(reflect: ReflectConfig, teacher: TeacherConfig) -> None:
    """Raise UserError for a template with an unknown placeholder, or without a needed one."""
    answer = {"answer"} if reflect.show_answer else set()
    note = {"answer_note"} if reflect.show_answer else set()
    attempt = ({"problem", "rollout"} | note, {"demonstration", "answer_note"})
    for option, template, (needed, optional) in (
        ("reflect.wrong_template", reflect.wrong_template, attempt),
        ("reflect.sentence_template", reflect.sentence_template, attempt),
        (
            "reflect.correct_template",
            reflect.correct_template,
            ({"problem", "rollout"}, {"answer_note"}),
        ),
        ("reflect.answer_note", reflect.answer_note, (answer, {"answer"})),
        ("teacher.wrong_template", teacher.wrong_template, ({"problem", "explanation"}, {"quote"})),
        ("teacher.correct_template", teacher.correct_template, ({"problem", "explanation"}, set())),
    ):
        found = placeholders(template)
        known = needed | optional
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
