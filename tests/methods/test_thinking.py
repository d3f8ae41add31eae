"""Methods that distil whole rollouts begin after the thinking, unless asked to include it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rosd_fast.config import Config
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import apply_args
from rosd_fast.methods.opd import Opd
from rosd_fast.methods.sdpo import Sdpo
from rosd_fast.report.progress import Hidden
from tests.chat_templates import SWITCHED, THINK_TOKENS, with_template

THOUGHT = "<think>\nIt is 4.\n</think>"


def built(tokenizer: Any, make_group: Any, method: Any, **options: Any) -> dict[str, Any]:
    """The samples of a method on two correct rollouts and one that only thinks, by rollout id."""
    other = with_template(tokenizer, SWITCHED, tokens=THINK_TOKENS)
    group, verdicts = make_group(["a", "b", "c"], [1.0, 1.0, 0.0])
    texts = [f"{THOUGHT}\n\nSo 4.", "Just 4.", "<think>\nIt may be"]
    rollouts = []
    for rollout, text in zip(group.rollouts, texts, strict=True):
        ids = tuple(other.encode(text))
        changes: dict[str, Any] = {
            "completion_ids": ids,
            "logprobs": (0.0,) * len(ids),
            "text": text,
        }
        rollouts.append(replace(rollout, **changes))
    group = replace(group, rollouts=tuple(rollouts))
    config = apply_args(Config(), options)
    unused: Any = None
    made = method(config, unused, unused, make_chats(config.chat, other))
    samples = made.build([group], verdicts, {}, Hidden()).samples
    return {
        s.rollout_id: (
            other.decode(s.completion_ids[s.start : s.end]),
            other.decode(s.teacher_prompt_ids),
        )
        for s in samples
    }


@pytest.mark.parametrize("method", [Opd, Sdpo])
def test_whole_rollouts_are_distilled_after_their_thinking(
    tokenizer: Any, make_group: Any, method: Any
) -> None:
    found = built(tokenizer, make_group, method)
    assert {name: text for name, (text, _) in found.items()} == {
        "p0/0": "\n\nSo 4.",
        "p0/1": "Just 4.",
    }
    asked = built(tokenizer, make_group, method, **{"span.thinking": True})
    assert asked["p0/0"][0] == f"{THOUGHT}\n\nSo 4." and asked["p0/2"][0] == "<think>\nIt may be"


def test_the_teacher_reads_a_sibling_as_chat_thinking_says(tokenizer: Any, make_group: Any) -> None:
    assert THOUGHT in built(tokenizer, make_group, Sdpo)["p0/1"][1]
    stripped = built(tokenizer, make_group, Sdpo, **{"chat.thinking": "strip"})["p0/1"][1]
    assert "So 4." in stripped and "<think>" not in stripped
