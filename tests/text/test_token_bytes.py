"""The bytes of sampled ids are those of the decoded text, for each kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rosd_fast.errors import UserError
from rosd_fast.text.token_bytes import TokenBytes

KINDS = ["tokenizer", "sentencepiece_tokenizer", "metaspace_tokenizer"]
HOSTILE = [
    "",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "שלום עולם \u202eabc",
    "a\r\nb\r\n",
    "NUL\x00 in \x00 it",
    " leading and trailing ",
    "<error_quote>a</error_quote>",
    "▁ and Ġ and <0x41>",
    "e\u0301 is not \u00e9",
]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, TokenBytes(tokenizer)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_of_random_ids_are_the_decoded_text(kind, data):
    tokenizer, token_bytes = kind
    # Two ids too many: models often have more embeddings than tokens.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=12))
    pieces = token_bytes.of(ids)
    assert len(pieces) == len(ids)
    assert b"".join(pieces).decode(errors="replace") == decode(tokenizer, ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_bytes_of_hostile_texts(kind, text):
    tokenizer, token_bytes = kind
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(token_bytes.of(ids)).decode()
    assert joined == decode(tokenizer, ids)
    if tokenizer.convert_ids_to_tokens(0) == "<|pad|>":  # byte-level: nothing is lost at all
        assert joined == text


def test_the_byte_alphabet(tokenizer):
    names = pre_tokenizers.ByteLevel.alphabet()
    pieces = TokenBytes(tokenizer).of(tokenizer.convert_tokens_to_ids(names))
    assert set(pieces) == {bytes([byte]) for byte in range(256)}
    every = "".join(map(chr, range(256)))
    ids = tokenizer.encode(every, add_special_tokens=False)
    assert b"".join(TokenBytes(tokenizer).of(ids)) == every.encode()


def test_special_tokens_have_no_bytes_and_added_ones_are_text(tokenizer):
    ids = tokenizer.encode("<think>So<|end|> 日本<|pad|>", add_special_tokens=False)
    pieces = TokenBytes(tokenizer).of(ids)
    assert pieces == [b"<think>", b"So", b"", b" ", "日本".encode(), b""]
    assert TokenBytes(tokenizer).of([]) == []
    assert TokenBytes(tokenizer).of([tokenizer.eos_token_id]) == [b""]


def test_a_character_over_several_tokens(tokenizer, sentencepiece_tokenizer):
    family = "👩‍👧"
    for kind in (tokenizer, sentencepiece_tokenizer):
        ids = kind.encode(family, add_special_tokens=False)
        pieces = TokenBytes(kind).of(ids)
        assert b"".join(pieces) == family.encode() and max(map(len, pieces)) < 4


def test_sentencepiece_drops_the_first_space_only(sentencepiece_tokenizer):
    ids = sentencepiece_tokenizer.encode("The wrong rate", add_special_tokens=False)
    token_bytes = TokenBytes(sentencepiece_tokenizer)
    assert token_bytes.of(ids) == [b"The", b" wrong", b" rate"]
    assert token_bytes.of([sentencepiece_tokenizer.bos_token_id, *ids])[:2] == [b"", b"The"]
    assert token_bytes.of(ids[1:]) == [b"wrong", b" rate"]


DECODERS = {
    "none": None,
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "metaspace": decoders.Metaspace(),
    "bpe suffix": decoders.BPEDecoder(suffix="</w>"),
    "strip each": decoders.Strip("a", 1, 0),
    "strip the start": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]),
    "strip the end": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 1)]),
    "strip a wide character": decoders.Sequence([decoders.Fuse(), decoders.Strip("▁", 2, 0)]),
    "nested": decoders.Sequence(
        [
            decoders.Sequence([decoders.Replace("▁", "xy"), decoders.ByteFallback()]),
            decoders.Fuse(),
            decoders.Strip("x", 1, 0),
        ]
    ),
    "replace in the text": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", "xy")]),
    "word piece": decoders.WordPiece(prefix="a"),
    "word piece, as it is": decoders.WordPiece(prefix="▁", cleanup=False),
    "byte level, nested": decoders.Sequence([decoders.ByteLevel()]),
}


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 13), max_size=6))
def test_every_decoder_is_followed(name, ids):
    tokens = "a b ab </w> a</w> ▁ ▁▁ ▁a <0xE2> <0x82> <0xAC> <0x41> Ġx Ãa".split()
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    if DECODERS[name] is not None:
        backend.decoder = DECODERS[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if name == "strip the end" and not ids:
        return  # the tokenizers library itself fails on an empty text
    pieces = TokenBytes(tokenizer).of(ids)
    assert b"".join(pieces).decode(errors="replace") == decode(tokenizer, ids)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "b")]),
        decoders.CTC(),
    ],
)
def test_a_decoder_that_mixes_tokens_is_refused(decoder):
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoder
    with pytest.raises(UserError, match="does not work token by token"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"object has no tokenizer\.json"):
        TokenBytes(object())
