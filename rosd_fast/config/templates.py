"""The placeholders that each prompt template must have and may have."""

from __future__ import annotations

from rosd_fast.config.schema import ReflectConfig, SelectConfig, TeacherConfig
from rosd_fast.errors import UserError
from rosd_fast.text.prompts import placeholders

Allowed = tuple[set[str], set[str]]
"""The placeholders that a template must have, and those that it may have."""


def check_templates(
    reflect: ReflectConfig, teacher: TeacherConfig, select: SelectConfig | None = None
) -> None:
    """Raise UserError for a template with an unknown placeholder, or without a needed one."""
    answer = {"answer"} if reflect.show_answer else set()
    note = {"answer_note"} if reflect.show_answer else set()
    attempt = ({"problem", "rollout"} | note, {"demonstration", "answer_note"})
    correct = ({"problem", "rollout"}, {"answer_note"})
    check_template("reflect.wrong_template", reflect.wrong_template, attempt)
    check_template("reflect.sentence_template", reflect.sentence_template, attempt)
    check_template("reflect.correct_template", reflect.correct_template, correct)
    check_template("reflect.answer_note", reflect.answer_note, (answer, {"answer"}))
    explained = {"explanation"} if reflect.control != "none" else set()
    taught, optional = {"problem"} | explained, {"explanation", "demonstration"}
    feedback = {"feedback"} if teacher.show_feedback else set()
    wrong = (taught | feedback, {"quote", "feedback"} | optional)
    check_template("teacher.wrong_template", teacher.wrong_template, wrong)
    check_template("teacher.correct_template", teacher.correct_template, (taught, optional))
    note = (set(), {"demonstration"})
    check_template("teacher.demonstration_note", teacher.demonstration_note, note)
    if select is not None and select.on_no_success == "answer":
        _check_answer(reflect)


def without_reflection(template: str) -> str:
    """The user turn of a teacher that has read no reflection (`reflect.control` none): {quote} and
    {explanation} are empty, and everything else stays.

    >>> without_reflection("{problem}\\n\\nA hint: {explanation}\\nSolve it.")
    '{problem}\\n\\nA hint: \\nSolve it.'
    """
    return template.replace("{quote}", "").replace("{explanation}", "")


def _check_answer(reflect: ReflectConfig) -> None:
    """Raise UserError where the reflector would not see the answer of a hopeless group."""
    name = "sentence_template" if reflect.mode == "sentence" else "wrong_template"
    if not placeholders(getattr(reflect, name)) & {"demonstration", "answer_note"}:
        raise UserError(
            "has no place for the right answer, which select.on_no_success answer shows",
            where=f"reflect.{name}",
            fix="Add {demonstration} or {answer_note}",
        )
    if "answer" not in placeholders(reflect.answer_note):
        raise UserError(
            "lacks the placeholder {answer}, which select.on_no_success answer shows",
            where="reflect.answer_note",
            fix="It must have {answer}",
        )


def check_solution_template(teacher: TeacherConfig) -> None:
    """Raise UserError as `check_templates`, for the methods whose teacher reads a solution."""
    feedback = {"feedback"} if teacher.show_feedback else set()
    check_template(
        "teacher.solution_template",
        teacher.solution_template,
        ({"problem", "demonstration"} | feedback, {"feedback"}),
    )


def check_template(option: str, template: str, allowed: Allowed) -> None:
    """Raise UserError for a template with an unknown placeholder, or without a needed one."""
    needed, optional = allowed
    found, known = placeholders(template), needed | optional
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
