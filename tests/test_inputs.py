"""What is checked before a run writes anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.inputs import check_budgets, with_absolute_paths
from rosd_fast.types import Problem

LONG = "{problem} {rollout}" + " and so on" * 600
PROBLEM = Problem(id="p", prompt="2 + 2 = ?", answer="4", verifier="number", domain="sums")


def check(tokenizer: Any, **sections: Any) -> None:
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    budget = {"max_prompt_tokens": 512}
    config = {name: budget | sections.get(name, {}) for name in ("reflect", "teacher")}
    check_budgets(Config.model_validate(config), model, PROBLEM)


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


def test_paths_are_the_same_from_wherever_a_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = {"python": ".venv-sglang/bin/python", "sync_folder": "weights"}
    data = {"train": "train.jsonl", "dev": "quickstart:dev"}
    found = with_absolute_paths(Config.model_validate({"engine": engine, "data": data}))
    assert found.engine.python == str(tmp_path / ".venv-sglang/bin/python")
    assert found.engine.sync_folder == str(tmp_path / "weights")
    assert found.data.train == str(tmp_path / "train.jsonl")
    assert found.data.dev == "quickstart:dev"
    engine = {"python": None, "sync_folder": "~/weights"}
    found = with_absolute_paths(Config.model_validate({"engine": engine, "data": data}))
    assert found.engine.python is None
    assert found.engine.sync_folder == str(Path.home() / "weights")
