"""The correct solution that is shown beside a rollout."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from rosd_fast.config import ChatConfig, SelectConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.rollout.siblings import demonstrate

TEXTS = ["two", "4, a long way round", "4"]


@pytest.fixture
def shown(tokenizer):
    return partial(show, tokenizer)


def show(tokenizer, made, index, policy="first", thinking: Any = "keep", **options):
    group, verdicts = made
    found = demonstrate(
        group,
        group.rollouts[index],
        verdicts,
        SelectConfig(**options),
        policy,
        key="7",
        chats=make_chats(ChatConfig(thinking=thinking), tokenizer),
    )
    return None if found is None else (found.id, found.text)


def test_a_correct_sibling_comes_first(shown, make_group):
    made = make_group(TEXTS, [0.0, 1.0, 1.0], reference="2 + 2 = 4")
    choices = {"on_no_success": "reference", "on_lone_success": "own"}
    assert shown(made, 0, **choices) == ("p0/1", TEXTS[1])
    assert shown(made, 0, policy="shortest") == ("p0/2", "4")
    assert shown(made, 1, **choices) == ("p0/2", "4")  # never the rollout itself
    assert shown(made, 2, **choices) == ("p0/1", TEXTS[1])


@pytest.mark.parametrize("reference", ["2 + 2 = 4", None])
def test_what_replaces_it(shown, make_group, reference):
    from_data = None if reference is None else ("reference", reference)
    lone = make_group(TEXTS, [0.0, 0.0, 1.0], reference=reference)
    assert shown(lone, 2) is None
    assert shown(lone, 2, on_lone_success="own") == ("p0/2", "4")
    assert shown(lone, 2, on_lone_success="reference") == from_data
    assert shown(lone, 2, on_no_success="reference") is None
    assert shown(lone, 0, on_lone_success="own") == ("p0/2", "4")
    hopeless = make_group(TEXTS, [0.0, 0.0, 0.0], reference=reference)
    assert shown(hopeless, 0, on_no_success="reference") == from_data
    for policy in ("skip", "keep", "answer"):
        assert shown(hopeless, 0, on_no_success=policy, on_lone_success="own") is None


def test_thinking_that_is_not_shown(shown, make_group):
    """Of a rollout that only thinks nothing is left to show."""
    own = {"on_lone_success": "own", "thinking": "strip"}
    made = make_group(["<think>Hm.</think>4", "two"], [1.0, 0.0])
    assert shown(made, 1, thinking="strip") == ("p0/0", "4")
    assert shown(made, 0, **own) == ("p0/0", "4")
    silent = make_group(["<think>It is 4"], [1.0], reference="2 + 2 = 4")
    assert shown(silent, 0, **own) is None
