"""The method ROSD: what it checks before a run."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.config import ChatConfig, Config
from rosd_fast.config.chat import make_chats
from rosd_fast.errors import UserError
from rosd_fast.methods.budgets import check_budgets
from rosd_fast.methods.rosd import used_templates
from rosd_fast.types import Problem

LONG = "{problem} {rollout}" + " and so on" * 600
PROBLEM = Problem(id="p", prompt="2 + 2 = ?", answer="4", verifier="number", domain="sums")


def check(tokenizer: Any, **sections: Any) -> None:
    budget = {"max_prompt_tokens": 512}
    config = {name: budget | sections.get(name, {}) for name in ("reflect", "teacher")}
    options, chats = Config.model_validate(config), make_chats(ChatConfig(), tokenizer)
    check_budgets(options, chats, PROBLEM, used_templates(options))


@pytest.mark.parametrize(
    ("mode", "template"),
    [
        ("sentence", "sentence_template"),
        ("verbatim", "wrong_template"),
        ("free", "wrong_template"),
        ("sentence", "correct_template"),
    ],
)
def test_a_template_that_is_used_must_fit(tokenizer: Any, mode: str, template: str) -> None:
    with pytest.raises(UserError, match=rf"reflect\.{template} and the problem have \d+ tokens"):
        check(tokenizer, reflect={"mode": mode, template: LONG})


def test_a_teachers_template_must_fit(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"teacher\.correct_template and the problem"):
        check(tokenizer, teacher={"correct_template": LONG})


def test_a_template_that_is_not_used_may_be_long(tokenizer: Any) -> None:
    check(tokenizer, reflect={"mode": "sentence", "wrong_template": LONG})
    check(tokenizer, reflect={"mode": "verbatim", "sentence_template": LONG})
    check(
        tokenizer,
        reflect={"on_correct": "skip", "correct_template": LONG},
        teacher={"correct_template": LONG},
    )
