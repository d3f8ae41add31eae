"""What users of other trainers complain about, in the texts: BOS twice, ends that are lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import processors

from rosd_fast.batch.samples import build_samples
from rosd_fast.config import TeacherConfig
from rosd_fast.text.chat import chat_format
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import ErrorSpan, Reflection
from tests.chat_templates import OPENED, THINK_TOKENS, with_template


def test_bos_once_though_template_and_tokenizer_write_it(sentencepiece_tokenizer: Any) -> None:
    own = copy.deepcopy(sentencepiece_tokenizer)
    bos = own.bos_token_id
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert own.encode("add")[0] == bos and "bos_token" in own.chat_template
    chat = chat_format(own)
    for ids in (chat.render("2 + 2 = ?"), chat.render("2 + 2 = ?", opening="<error_quote>")):
        assert ids[0] == bos and ids.count(bos) == 1


def test_the_end_is_distilled_though_it_is_the_padding_token(
    tokenizer: Any, make_group: Any
) -> None:
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    assert own.pad_token_id == own.eos_token_id
    group, _ = make_group(["It is 4."], [1.0])
    (rollout,) = group.rollouts
    assert rollout.completion_ids[-1] == own.pad_token_id
    length = len(rollout.completion_ids)
    reflection = Reflection(
        rollout_id=rollout.id,
        demonstration_id=None,
        correct=True,
        text="",
        quote=None,
        explanation="Right.",
        well_formed=True,
        num_tokens=1,
    )
    (sample,) = build_samples(
        [group],
        {rollout.id: reflection},
        {rollout.id: ErrorSpan(rollout_id=rollout.id, start=0, end=length, source="full")},
        chat=chat_format(own),
        config=TeacherConfig(),
    )
    assert sample.completion_ids == rollout.completion_ids and sample.end == length
    assert TokenBytes(own).of(rollout.completion_ids)[-1] == b""


@pytest.mark.parametrize("switch", [None, True, False])
def test_a_template_that_prefills_thinking(tokenizer: Any, switch: bool | None) -> None:
    """The prompt ends within <think>, whatever the argument; it is closed for a reflection."""
    prefills = OPENED.replace(
        "<|assistant|><think>\\n' }}", "<|assistant|>' + ('' if enable_thinking is false else "
        "'<think>\\n') }}"
    )  # fmt: skip
    own = with_template(tokenizer, prefills, tokens=THINK_TOKENS)
    chat = chat_format(own, kwargs={} if switch is None else {"enable_thinking": switch})
    opened = switch is not False
    text = own.decode(chat.render("2 + 2 = ?"))
    assert text.endswith("<|assistant|>" + "<think>\n" * opened)
    assert (chat.mode == "open") == opened
    closed = own.decode(chat.without_thinking().render("2 + 2 = ?", opening="<error_quote>"))
    assert closed.endswith("<|assistant|><error_quote>")
