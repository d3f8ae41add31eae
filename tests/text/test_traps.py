"""Each known trap, set off, and not set off where there is nothing to warn of."""

from __future__ import annotations

import copy
from typing import Any

from rosd_fast.config import ChatConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.text import traps
from rosd_fast.text.chat import chat_format
from tests.chat_templates import (
    CHANNELS,
    OPENED,
    SWITCHED,
    THINK_TOKENS,
    with_channels,
    with_template,
)

USER_ONLY = "<|user|>{{ messages[-1].content }}<|end|><|assistant|>"


def test_student_and_teacher_in_different_modes(tokenizer: Any) -> None:
    other = with_template(tokenizer, SWITCHED, tokens=THINK_TOKENS)
    plain, closed = (chat_format(other, kwargs=k) for k in ({}, {"enable_thinking": False}))
    opened = chat_format(with_template(tokenizer, OPENED, tokens=THINK_TOKENS))
    assert traps.modes_differ(plain, plain) is traps.modes_differ(opened, opened) is None
    text = traps.modes_differ(opened, closed)
    assert text is not None
    assert "student's prompt ends within thinking and the teacher's ends after thinking" in text
    assert traps.modes_differ(plain, closed) is not None


def test_bos_twice(sentencepiece_tokenizer: Any) -> None:
    once = chat_format(sentencepiece_tokenizer)
    assert traps.bos_twice(once, "student") is None
    twice = "{{ bos_token }}" + sentencepiece_tokenizer.chat_template
    text = traps.bos_twice(chat_format(sentencepiece_tokenizer, template=twice), "student")
    assert text == "student: the prompt begins with <s> twice"


def test_a_template_that_drops_the_system_turn(tokenizer: Any) -> None:
    drops = chat_format(tokenizer, template=USER_ONLY)
    assert traps.no_system_role(drops, "eval", with_system=False) is None
    assert "eval: the chat template drops system" in str(
        traps.no_system_role(drops, "eval", with_system=True)
    )
    asked = chat_format(tokenizer, template=USER_ONLY, system="Be brief.")
    assert traps.no_system_role(asked, "eval", with_system=False) is not None
    assert traps.no_system_role(chat_format(tokenizer), "eval", with_system=True) is None


def test_the_token_that_ends_an_answer_is_no_stop_token(tokenizer: Any) -> None:
    chat, end = chat_format(tokenizer), tokenizer.eos_token_id
    assert traps.end_of_turn_missing(chat, "student", [end]) is None
    text = traps.end_of_turn_missing(chat, "student", [end + 1])
    assert text is not None and f"ends an answer with <|end|> ({end})" in text
    channels = chat_format(with_channels(tokenizer))  # earlier turns end with <|end|>
    assert channels.source == CHANNELS
    returned = channels.tokenizer.convert_tokens_to_ids("<|return|>")
    assert traps.end_of_turn(channels) == returned
    asks = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    assert traps.end_of_turn(chat_format(tokenizer, template=asks)) is None  # it has no answers
    refuses = "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    assert traps.end_of_turn(chat_format(tokenizer, template=refuses + USER_ONLY)) is None


def test_an_argument_that_the_template_does_not_read(tokenizer: Any) -> None:
    other = with_template(tokenizer, SWITCHED, tokens=THINK_TOKENS)
    chat = chat_format(other, kwargs={"enable_thinkng": False, "enable_thinking": False})
    assert traps.unread_kwargs(chat, "teacher") == [
        "teacher: the chat template does not read the argument enable_thinkng; it reads "
        "enable_thinking"
    ]


def test_eos_and_pad(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    assert traps.eos_differs(tokenizer, [end, 7]) is traps.eos_differs(tokenizer, []) is None
    assert f"<|end|> ({end})" in str(traps.eos_differs(tokenizer, [7]))
    assert traps.pad_is_eos(tokenizer) is None
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    assert "the padding token is the end-of-text token <|end|>" in str(traps.pad_is_eos(other))


def test_all_traps_at_once_and_each_once(tokenizer: Any) -> None:
    def found(tokenizer: Any, **options: Any) -> list[str]:
        return traps.find_traps(
            make_chats(ChatConfig.model_validate(options), tokenizer),
            stop_token_ids=[tokenizer.eos_token_id],
            generation_eos=[tokenizer.eos_token_id],
            with_system=True,
        )

    assert found(tokenizer) == []
    (text,) = found(tokenizer, kwargs="enable_thinking=false")  # of all four roles
    assert text.startswith("student: the chat template does not read the argument enable_thinking")
    other = with_template(tokenizer, SWITCHED, tokens=THINK_TOKENS)
    (text,) = found(other, teacher={"kwargs": "enable_thinking=false"})
    assert text.startswith("the student's prompt leaves it to the model")
