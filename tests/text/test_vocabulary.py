"""Comparing the vocabularies of two tokenizers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rosd_fast.errors import UserError
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.text.vocabulary import shared_vocabulary, vocabulary_bytes


def changed(tokenizer: Any, change: Any) -> PreTrainedTokenizerFast:
    """A copy whose tokenizer.json, as a dictionary, went through `change`."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


def swap(spec: dict[str, Any], one: str, two: str) -> None:
    vocab = spec["model"]["vocab"]
    vocab[one], vocab[two] = vocab[two], vocab[one]


@pytest.mark.parametrize(
    "fixture", ["tokenizer", "sentencepiece_tokenizer", "metaspace_tokenizer", "smollm2_tokenizer"]
)
def test_a_tokenizer_shares_its_own_vocabulary(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(fixture)
    found = shared_vocabulary(tokenizer, tokenizer, where="teacher")
    assert found.size == max(tokenizer.get_vocab().values()) + 1
    assert (found.num_student_only, found.num_teacher_only, found.describe()) == (0, 0, "")


@pytest.mark.parametrize(
    "fixture", ["tokenizer", "sentencepiece_tokenizer", "metaspace_tokenizer", "smollm2_tokenizer"]
)
def test_bytes_are_those_of_the_text(fixture: str, request: pytest.FixtureRequest) -> None:
    """`TokenBytes` decodes a whole text; here each id is decoded by itself."""
    tokenizer = request.getfixturevalue(fixture)
    text = "a naïve café, 日本語\n and 12 apples"
    ids = tokenizer.encode(text, add_special_tokens=False)
    alone, within = vocabulary_bytes(tokenizer), TokenBytes(tokenizer).of(ids)
    assert [alone[token] for token in ids[1:]] == within[1:]
    assert alone[ids[0]].strip() == within[0].strip()  # a first space may be dropped


def test_two_swapped_tokens_are_named(tokenizer: Any) -> None:
    other = changed(tokenizer, lambda spec: swap(spec, "A", "B"))
    first = tokenizer.convert_tokens_to_ids("A")
    assert len(tokenizer) == len(other)
    with pytest.raises(UserError) as error:
        shared_vocabulary(tokenizer, other, where="teacher.model: there")
    assert str(error.value).startswith(
        f"teacher.model: there: its tokenizer is another one: token {first} is 'B' and the "
        "student's is 'A' (2 ids differ)"
    )


def test_bytes_that_are_no_text_are_compared(tokenizer: Any) -> None:
    """Both are U+FFFD as text."""
    bytes_of = vocabulary_bytes(tokenizer)
    one, two = (
        tokenizer.convert_ids_to_tokens(token)
        for token in [id for id, text in bytes_of.items() if text in (b"\xe6", b"\xe7")]
    )
    other = changed(tokenizer, lambda spec: swap(spec, one, two))
    with pytest.raises(UserError, match=r"is b'\\xe[67]' and the student's is b'\\xe[67]'"):
        shared_vocabulary(tokenizer, other, where="teacher")


def test_byte_fallback_tokens_are_compared(sentencepiece_tokenizer: Any) -> None:
    other = changed(sentencepiece_tokenizer, lambda spec: swap(spec, "<0xE6>", "<0xE7>"))
    with pytest.raises(UserError, match=r"2 ids differ"):
        shared_vocabulary(sentencepiece_tokenizer, other, where="teacher")


def test_special_tokens_are_compared_by_content(tokenizer: Any) -> None:
    def rename(spec: dict[str, Any]) -> None:
        added = next(token for token in spec["added_tokens"] if token["content"] == "<|user|>")
        added["content"] = "<|human|>"
        vocab = spec["model"]["vocab"]
        vocab["<|human|>"] = vocab.pop("<|user|>")

    with pytest.raises(UserError, match=r"is '<\|human\|>' and the student's is '<\|user\|>'"):
        shared_vocabulary(tokenizer, changed(tokenizer, rename), where="teacher")


def test_the_same_bytes_under_other_names(tokenizer: Any) -> None:
    """A word that is special on one side, and a decoder that spells its space differently."""

    def no_special(spec: dict[str, Any]) -> None:
        for token in spec["added_tokens"]:
            token["special"] = False

    assert shared_vocabulary(tokenizer, changed(tokenizer, no_special), where="t").size

    def plain_space(spec: dict[str, Any]) -> None:
        vocab = spec["model"]["vocab"]
        spec["model"]["merges"] = []
        for name in list(vocab):
            vocab[name.replace("Ġ", "▁")] = vocab.pop(name)
        spec["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": "Ġ"},
                spec["decoder"],
            ],
        }

    assert shared_vocabulary(tokenizer, changed(tokenizer, plain_space), where="t").size


def test_ids_of_one_side_only(tokenizer: Any) -> None:
    def add(spec: dict[str, Any]) -> None:
        size = len(tokenizer)
        token = {**spec["added_tokens"][0], "id": size, "content": "<|more|>"}
        spec["added_tokens"].append(token)

    more = changed(tokenizer, add)
    found = shared_vocabulary(tokenizer, more, where="t")
    assert (found.size, found.num_student_only, found.num_teacher_only) == (len(more), 0, 1)
    assert found.describe() == "token ids: 1 in the teacher's tokenizer only"
