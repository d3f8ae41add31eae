"""Where the thinking of a completion ends: by token ids, by text, and in channels."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import ChatConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.text.decode import decode
from rosd_fast.text.thinking import THINK, Thinking, _last
from rosd_fast.types import Rollout
from tests.chat_templates import OPENED, SWITCHED, THINK_TOKENS, with_channels, with_template
from tests.made_tokenizers import words


def answer_of(tokenizer: Any, text: str, *, opened: bool = False) -> str:
    """What follows the thinking in `text`; its tokens are those of the tokenizer."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    number = Thinking(tokenizer).num_tokens(ids, opened=THINK if opened else None)
    return tokenizer.decode(ids[number:])


@pytest.mark.parametrize("tokens", [THINK_TOKENS, [], ["</think>"]], ids=["ids", "text", "mixed"])
@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        ("2 + 2 is 4.", False, "2 + 2 is 4."),
        ("<think>\nit is 4\n</think>\n\nSo 4.", False, "\n\nSo 4."),
        ("it is 4\n</think>\n\nSo 4.", True, "\n\nSo 4."),
        ("it is 4", True, ""),
        ("<think>\nit is 4", False, ""),
        ("it is 4</think>a<think>no</think>b", True, "b"),
        ("it is 4</think>a<think>no", True, ""),
        ("We write </think> here.", False, "We write </think> here."),
        ("", True, ""),
    ],
)
def test_the_answer_begins_after_the_last_closing_tag(
    tokenizer: Any, tokens: list[str], text: str, opened: bool, answer: str
) -> None:
    other = with_template(tokenizer, SWITCHED, tokens=tokens)
    assert answer_of(other, text, opened=opened) == answer


def test_tags_that_are_tokens_are_not_found_in_text_that_spells_them(tokenizer: Any) -> None:
    other = with_template(tokenizer, SWITCHED, tokens=THINK_TOKENS)
    spelled = [i for part in ("<think", ">a</", "think", ">b") for i in other.encode(part)]
    assert other.decode(spelled) == "<think>a</think>b"
    assert Thinking(other).num_tokens(spelled, opened=None) == 0


def test_unknown_words_are_no_tags() -> None:
    """The token of unknown words is an added one, which a tag may be encoded to."""
    tokenizer: Any = words()
    ids = tokenizer.convert_tokens_to_ids(["add", "<unk>", "the"])
    assert tokenizer.encode("<think>") == ids[1:2]
    assert Thinking(tokenizer).num_tokens(ids, opened=None) == 0


def test_the_final_channel_is_the_answer(tokenizer: Any) -> None:
    other = with_channels(tokenizer)
    text = (
        "<|channel|>analysis<|message|>it is 4<|end|><|start|>assistant<|channel|>final<|message|>"
    )
    ids = other.encode(text + "So 4.<|return|>")
    number = Thinking(other).num_tokens(ids, opened=None)
    assert other.decode(ids[number:]) == "So 4.<|return|>"
    assert Thinking(other).num_tokens(other.encode("analysis final"), opened=None) == 0


def rollout(tokenizer: Any, text: str) -> Rollout:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return Rollout(
        id="p/0",
        problem_id="p",
        prompt_ids=(1,),
        completion_ids=ids,
        logprobs=(0.0,) * len(ids),
        text=decode(tokenizer, ids),
        finish_reason="stop",
        policy_version=0,
    )


@pytest.mark.parametrize("tokens", [THINK_TOKENS, []], ids=["ids", "text"])
@pytest.mark.parametrize(
    ("text", "strip", "last"),
    [
        ("No thoughts.\n\nIt is 4.", "No thoughts.\n\nIt is 4.", "No thoughts.\n\nIt is 4."),
        (
            "<think>\nFirst.\n\nSo it is 4.\n</think>\n\nIt is 4.",
            "It is 4.",
            "So it is 4.\n</think>\n\nIt is 4.",
        ),
        ("<think>One.</think>It is 4.", "It is 4.", "<think>One.</think>It is 4."),
        ("<think>\nFirst.\n\nSecond, cut", "", "Second, cut"),
    ],
)
def test_what_is_shown_of_a_rollout(
    tokenizer: Any, tokens: list[str], text: str, strip: str, last: str
) -> None:
    other = with_template(tokenizer, SWITCHED, tokens=tokens)
    sampled = rollout(other, text)
    for policy, expected in (("keep", text), ("strip", strip), ("last", last)):
        chats = make_chats(ChatConfig.model_validate({"thinking": policy}), other)
        shown, start = chats.shown(sampled)
        assert shown == expected
        assert decode(other, sampled.completion_ids[start:]).lstrip() == expected


def test_thinking_that_the_students_prompt_opens_counts(tokenizer: Any) -> None:
    other = with_template(tokenizer, OPENED, tokens=THINK_TOKENS)
    sampled = rollout(other, "it is 4\n</think>\n\nSo 4.")
    chats = make_chats(ChatConfig(thinking="strip"), other)
    assert chats.shown(sampled)[0] == "So 4."
    other.chat_template = SWITCHED  # whose prompt does not open thinking
    assert make_chats(ChatConfig(thinking="strip"), other).shown(sampled)[0] == sampled.text


@given(ids=st.lists(st.integers(0, 2), max_size=12), part=st.lists(st.integers(0, 2), min_size=1))
def test_the_last_place_of_a_tag(ids: list[int], part: list[int]) -> None:
    places = [at for at in range(len(ids)) if ids[at : at + len(part)] == part]
    assert _last(tuple(ids), part) == max(places, default=-1)


@pytest.mark.parametrize("blanks", [0, 5, 200])
def test_a_tag_in_text_may_follow_blanks(blanks: int, smollm2_tokenizer: Any) -> None:
    """The first tokens tell whether thinking is opened, unless they are all blank."""
    thinking = Thinking(smollm2_tokenizer)
    before = smollm2_tokenizer.encode("\n", add_special_tokens=False) * blanks

    def number(text: str) -> int:
        ids = [*before, *smollm2_tokenizer.encode(text, add_special_tokens=False)]
        return thinking.num_tokens(ids, opened=None)

    assert number("<think>2 + 2</think>4") > blanks
    assert number("<thin") == number("") == number("4 <think>2</think>") == 0
