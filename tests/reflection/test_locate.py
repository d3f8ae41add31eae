"""Quotes are located to the fewest tokens that contain them, and become spans."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.config import SpanConfig
from rosd_fast.reflection.locate import (
    locate,
    locate_errors,
    locate_sentence,
    normalize,
    replace_invalid,
)
from rosd_fast.text.sentences import sentences
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Reflection

KINDS = [
    "tokenizer",
    "prefix_space_tokenizer",
    "sentencepiece_tokenizer",
    "metaspace_tokenizer",
    pytest.param("smollm2_tokenizer", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, TokenBytes(tokenizer)


def characters(pieces):
    """The oracle: each character of the text with the set of tokens that contain its bytes."""
    data = b"".join(pieces)
    token_of = [token for token, piece in enumerate(pieces) for _ in piece]
    result, place = [], 0
    while place < len(data):
        for length in (1, 2, 3, 4):
            try:
                char = data[place : place + length].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            char = "\ufffd"
            length = max(
                n for n in (1, 2, 3) if data[place : place + n].decode(errors="replace") == char
            )
        length = min(length, len(data) - place)
        result.append((char, set(token_of[place : place + length])))
        place += length
    return result


def find(quote, pieces):
    match = locate(quote, pieces)
    assert match is not None, quote
    return match


def assert_all_substrings_are_found(pieces, text):
    held = characters(pieces)
    assert "".join(char for char, _ in held) == text
    for first in range(len(text)):
        for last in range(first + 1, len(text) + 1):
            quote = text[first:last]
            if not quote.strip():
                assert locate(quote, pieces) is None
                continue
            match = find(quote, pieces)
            place = text.find(quote)
            tokens = set().union(*(own for _, own in held[place : place + len(quote)]))
            assert (match.start, match.end) == (min(tokens), max(tokens) + 1), quote
            assert match.ambiguous == (text.find(quote, place + 1) >= 0)
            assert match.sentence_start <= match.start and match.end <= match.sentence_end


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_substring_of_random_ids_is_located(kind, data):
    tokenizer, token_bytes = kind
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=10))
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert_all_substrings_are_found(token_bytes.of(ids), text)


@pytest.mark.parametrize(
    "text",
    [
        "The wrong step is wrong.",
        "👩‍👩‍👧‍👦 ok 🏳️‍🌈",
        "שלום עולם \u202eabc",
        "a\r\nb\r\n",
        "N\x00 in \x00",
        "<error_quote>a</error_quote>",
        "e\u0301 \u00e9",
    ],
)
def test_every_substring_of_hostile_texts_is_located(tokenizer, text):
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert_all_substrings_are_found(TokenBytes(tokenizer).of(ids), text)


def test_a_leading_space_token_is_part_of_the_quote_that_starts_inside_it(tokenizer):
    ids = tokenizer.encode("First, the wrong rate was used.", add_special_tokens=False)
    pieces = TokenBytes(tokenizer).of(ids)
    wrong = pieces.index(b" wrong")
    for quote in ("wrong", " wrong", "ong", "wrong "):
        match = find(quote, pieces)
        assert match.start == wrong
    assert find("wrong", pieces).end == wrong + 1
    assert find("wrong ", pieces).end == wrong + 2
    assert find(" wrong rate", pieces).end == wrong + 2


def test_whitespace_around_a_quote_is_dropped_only_if_needed():
    pieces = [b"15", b" and", b" 5", b"."]
    assert (find("5", pieces).start, find("5", pieces).ambiguous) == (0, True)
    assert (find(" 5", pieces).start, find(" 5", pieces).ambiguous) == (2, False)
    assert find("\n and\n", pieces).start == 1


@pytest.mark.parametrize(
    "quote", ["", " ", "\n\t\u00a0", "and  5", "AND", "andd", "\ud800", "15 and 5.."]
)
def test_a_miss(quote):
    assert locate(quote, [b"15", b" and", b" 5", b"."]) is None


def test_misses_in_a_completion_without_text(tokenizer):
    assert locate("a", []) is None
    assert locate("a", TokenBytes(tokenizer).of([tokenizer.eos_token_id])) is None


def test_empty_tokens_are_left_out_at_the_ends_only():
    pieces = [b"", b"a", b"", b"b", b"", b""]
    match = find("ab", pieces)
    assert (match.start, match.end) == (1, 4)


def test_a_damaged_character_matches_its_replacement():
    pieces = [b"x\xe2", b"\x82", b"y\xff", b"z"]
    assert find("\ufffdy", pieces).start == 0
    assert find("\ufffdz", pieces).start == 2
    assert replace_invalid(b"ab") == (b"ab", None)
    assert replace_invalid(b"") == (b"", None)


@given(st.binary(max_size=30))
def test_invalid_bytes_are_replaced_as_decoding_does(data):
    text, origins = replace_invalid(data)
    assert text.decode() == data.decode(errors="replace")
    if origins is not None:
        assert len(origins) == len(text)
        assert sorted({byte for pair in origins for byte in range(*pair)}) == list(range(len(data)))


TEXT = "Add 3.5 to 4. Is it 8? No!  It is 7.5.\nSo halve it: 3.75"


@pytest.mark.parametrize(
    ("quote", "sentence"),
    [
        ("3.5", "Add 3.5 to 4."),
        ("Add", "Add 3.5 to 4."),
        ("4.", "Add 3.5 to 4."),
        ("4. Is", "Add 3.5 to 4. Is it 8?"),
        ("it 8?", "Is it 8?"),
        ("No", "No!"),
        ("!  It", "No!  It is 7.5."),
        ("7.5.\nSo", "It is 7.5.\nSo halve it: 3.75"),
        ("5.\n", "It is 7.5."),
        ("\nSo", "So halve it: 3.75"),
        ("75", "So halve it: 3.75"),
    ],
)
def test_sentences(quote, sentence):
    pieces = [char.encode() for char in TEXT] + [b""]
    match = find(quote, pieces)
    found = TEXT[match.sentence_start : match.sentence_end]
    assert found.strip() == sentence
    assert match.sentence_end < len(pieces)  # never the stop token
    assert match.sentence_start == min(TEXT.index(sentence), match.start)


@settings(max_examples=200)
@given(text=st.text("ab3. !?\n", min_size=1, max_size=24), data=st.data())
def test_sentences_of_random_texts(text, data):
    first = data.draw(st.integers(0, len(text) - 1))
    quote = text[first : data.draw(st.integers(first + 1, len(text)))].strip()
    if not quote:
        return
    first = text.find(quote)
    last = first + len(quote)
    match = find(quote, [char.encode() for char in text])
    held = [pair for pair in sentences(text.encode()) if pair[0] < last and pair[1] > first]
    assert (match.sentence_start, match.sentence_end) == (held[0][0], held[-1][1])


@pytest.mark.parametrize(
    ("quote", "found", "text"),
    [
        ("the ﬁrst  Step", "normalized", "The first\nstep"),
        ("½", "normalized", "½"),
        ("1⁄2", "normalized", "½"),
        ("cafe\u0301", "normalized", "café"),
        ("e = mc2", "normalized", "E = mc²"),
        ("the fxrst step is wrong", "fuzzy", "The first\nstep is wrong"),
        ("something else altogether", None, None),
        ("\u200b \ud800", None, None),
    ],
)
def test_quotes_that_are_not_copied_to_the_letter(quote, found, text):
    completion = "The first\nstep is wrong: ½ of a café, E = mc²."
    pieces = [char.encode() for char in completion]
    assert quote in completion or locate(quote, pieces) is None
    match = locate(quote, pieces, min_score=80)
    if quote in completion:
        found = "quote"
    if found is None:
        assert match is None
        return
    assert match is not None and match.found == found
    assert completion[match.start : match.end].strip() == text


@given(st.text(max_size=40))
def test_normalize_keeps_track_of_bytes(text):
    text = text.encode(errors="replace").decode()
    shown, origins = normalize(text)
    assert len(shown) == len(origins)
    data = text.encode()
    assert all(a[0] <= b[0] for a, b in pairwise(origins))
    for char, (first, last) in zip(shown, origins, strict=True):
        assert char in normalize(data[first:last].decode())[0]


@pytest.mark.parametrize("occurrence", ["first", "last"])
def test_the_first_or_the_last_of_several_occurrences(occurrence):
    pieces = [b"a", b"b", b"a", b"b", b"A"]
    assert find("ab", pieces).ambiguous
    match = locate("ab", pieces, occurrence=occurrence)
    assert match is not None and match.start == {"first": 0, "last": 2}[occurrence]
    match = locate("B", pieces, occurrence=occurrence, min_score=90)
    assert match is not None and match.found == "normalized" and match.ambiguous
    assert match.start == {"first": 1, "last": 3}[occurrence]


def test_a_sentence_by_its_number(tokenizer):
    text = "Add 3.5. It is wrong. It is wrong. End"
    pieces = TokenBytes(tokenizer).of([*tokenizer.encode(text), tokenizer.eos_token_id])
    for number, want in enumerate(["Add 3.5.", "It is wrong.", "It is wrong.", "End"], 1):
        match = locate_sentence(number, pieces)
        assert match is not None and not match.ambiguous
        assert b"".join(pieces[match.start : match.end]).decode().strip() == want
        assert (match.sentence_start, match.sentence_end) == (match.start, match.end)
    third, second = locate_sentence(3, pieces), locate_sentence(2, pieces)
    assert third is not None and second is not None and third.start >= second.end
    assert locate_sentence(0, pieces) is None
    assert locate_sentence(5, pieces) is None
    assert locate_sentence(1, []) is None


def test_long_rollouts(tokenizer):
    """A search that is quadratic in the length would take hours."""
    text = "It is 3.5. " * 40_000
    pieces = [text[i : i + 3].encode() for i in range(0, len(text), 3)]
    match = locate("3.5. It", pieces, occurrence="last")
    assert match is not None and match.start > len(pieces) - 10
    match = locate("IT  IS 3.5.", pieces, min_score=90)
    assert match is not None and match.found == "normalized" and match.start == 0
    match = locate("It was 3.4. Itt", pieces, min_score=60)
    assert match is not None and match.found == "fuzzy"
    assert locate_sentence(40_000, pieces) is not None


def make_reflection(
    rollout_id: str,
    *,
    correct: bool = False,
    quote: str | None = None,
    explanation: str | None = "Because.",
) -> Reflection:
    return Reflection(
        rollout_id=rollout_id,
        demonstration_id=None,
        correct=correct,
        text="",
        quote=quote,
        explanation=explanation,
        well_formed=True,
        num_tokens=3,
    )


@pytest.fixture(scope="module")
def step(make_group):
    """A correct rollout; wrong: found, found twice, missed, unquoted, unexplained, unreflected."""
    wrong = "We add. The wrong rate was used, 3.5. So the answer is wrong."
    group, verdicts = make_group(["The answer is 12.", *[wrong] * 6], [1.0, *[0.0] * 6])
    reflections = {
        "p0/0": make_reflection("p0/0", correct=True),
        "p0/1": make_reflection("p0/1", quote="rate was"),
        "p0/2": make_reflection("p0/2", quote="wrong"),
        "p0/3": make_reflection("p0/3", quote="right"),
        "p0/4": make_reflection("p0/4", quote=None),
        "p0/5": make_reflection("p0/5", quote="rate was", explanation=None),
    }
    return group, verdicts, reflections


def locate_step(tokenizer, step, **options):
    group, verdicts, reflections = step
    return locate_errors(
        [group],
        verdicts,
        reflections,
        token_bytes=TokenBytes(tokenizer),
        config=SpanConfig(**options),
    )


@pytest.mark.parametrize(
    ("granularity", "text"),
    [
        ("suffix", " rate was used, 3.5. So the answer is wrong.<|end|>"),
        ("span", " rate was"),
        ("sentence", " The wrong rate was used, 3.5."),
    ],
)
def test_granularity(tokenizer, step, granularity, text):
    spans = locate_step(tokenizer, step, granularity=granularity).spans
    ids = step[0].rollouts[1].completion_ids
    span = spans["p0/1"]
    assert tokenizer.decode(ids[span.start : span.end]) == text
    assert span.source == "quote"
    assert list(spans) == ["p0/0", "p0/1", "p0/2"]
    whole = spans["p0/0"]
    assert (whole.start, whole.end, whole.source) == (
        0,
        len(step[0].rollouts[0].completion_ids),
        "full",
    )


def test_a_miss_is_skipped_or_distilled_whole_and_counted(tokenizer, step):
    skipped = locate_step(tokenizer, step, on_miss="skip")
    full = locate_step(tokenizer, step, on_miss="full")
    for located in (skipped, full):
        numbers = (located.num_quotes, located.num_found, located.num_ambiguous, located.num_missed)
        assert numbers == (4, 2, 1, 2)
    assert list(full.spans) == ["p0/0", "p0/1", "p0/2", "p0/3", "p0/4"]
    length = len(step[0].rollouts[3].completion_ids)
    for rollout_id in ("p0/3", "p0/4"):
        span = full.spans[rollout_id]
        assert (span.start, span.end, span.source) == (0, length, "full")


def test_a_quote_that_occurs_twice_may_count_as_missed(tokenizer, step):
    located = locate_step(tokenizer, step, occurrence="unique_only")
    assert list(located.spans) == ["p0/0", "p0/1"]
    assert (located.num_found, located.num_ambiguous, located.num_missed) == (1, 1, 3)
    last = locate_step(tokenizer, step, occurrence="last").spans["p0/2"]
    pieces = TokenBytes(tokenizer).of(step[0].rollouts[2].completion_ids)
    assert last.start == len(pieces) - 1 - pieces[::-1].index(b" wrong")


def test_a_missed_quote_may_match_the_most_similar_passage(tokenizer, step):
    group, verdicts, _ = step
    reflections = {
        "p0/1": make_reflection("p0/1", quote="RATE was"),
        "p0/2": make_reflection("p0/2", quote="the wrng rate was"),
        "p0/3": make_reflection("p0/3", quote="nothing like it at all"),
        "p0/4": replace(make_reflection("p0/4"), sentence=2),
    }
    located = locate_step(
        tokenizer, (group, verdicts, reflections), on_miss="fuzzy", min_score=80, granularity="span"
    )
    sources = {name: span.source for name, span in located.spans.items()}
    assert sources == {"p0/1": "normalized", "p0/2": "fuzzy", "p0/4": "quote"}
    assert (located.num_normalized, located.num_fuzzy, located.num_missed) == (1, 1, 1)
    ids = group.rollouts[4].completion_ids
    span = located.spans["p0/4"]
    assert tokenizer.decode(ids[span.start : span.end]) == " The wrong rate was used, 3.5."
    assert located.metrics()["reflect/inexact_frac"] == 0.5


def test_metrics(tokenizer, step):
    located = locate_step(tokenizer, step, granularity="span")
    pieces = TokenBytes(tokenizer).of(step[0].rollouts[1].completion_ids)
    starts = [pieces.index(b" rate") / len(pieces), pieces.index(b" wrong") / len(pieces)]
    lengths = [len(step[0].rollouts[0].completion_ids), 2, 1]
    assert located.metrics() == pytest.approx(
        {
            "reflect/found_frac": 0.5,
            "reflect/ambiguous_frac": 0.25,
            "reflect/inexact_frac": 0.0,
            "reflect/span_start_frac": sum(starts) / 2,
            "reflect/span_tokens": sum(lengths) / 3,
        }
    )
    group, verdicts, _ = step
    nothing = locate_errors(
        [group], verdicts, {}, token_bytes=TokenBytes(tokenizer), config=SpanConfig()
    )
    assert nothing.metrics() == {} and nothing.spans == {}


def test_a_correct_rollout_of_the_stop_token_alone_is_whole(tokenizer, make_group):
    group, verdicts = make_group([""], [1.0])
    reflections = {"p0/0": make_reflection("p0/0", correct=True)}
    spans = locate_step(tokenizer, (group, verdicts, reflections)).spans
    assert (spans["p0/0"].start, spans["p0/0"].end) == (0, 1)
