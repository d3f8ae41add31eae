"""Grammars for tokenizers whose bytes llguidance does not know: metaspace, words, word pieces."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rosd_fast.engines.local import token_view
from rosd_fast.engines.local.grammar_mask import Constraint, GrammarCompiler, allowed_tokens
from rosd_fast.errors import UserError
from rosd_fast.reflection.grammar import (
    QUOTE,
    SENTENCE,
    Think,
    check_spelling,
    explanation_grammar,
    sentence_grammar,
    verbatim_grammar,
)
from rosd_fast.reflection.locate import locate
from rosd_fast.reflection.parse import parse_reflection
from rosd_fast.text.decode import decode
from rosd_fast.text.token_bytes import TokenBytes, ends_words
from tests.made_tokenizers import KINDS, word_pieces, wrapped

EXTRA = 5  # rows of the head beyond the tokenizer's ids


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any) -> Any:
    return KINDS[request.param]()


def constraint_of(tokenizer: Any, grammar: str) -> Constraint:
    compiler = GrammarCompiler(tokenizer, len(tokenizer) + EXTRA)
    return compiler.constraint(grammar, [tokenizer.eos_token_id], where="here")


def walk(tokenizer: Any, grammar: str, *, seed: int, most: int = 60) -> tuple[list[int], bool]:
    """(Tokens that the grammar allows, each drawn at random; whether the text is complete)."""
    draw, constraint, ids = random.Random(seed), constraint_of(tokenizer, grammar), []
    while len(ids) < most:
        allowed = allowed_tokens([constraint], len(tokenizer) + EXTRA)[0].nonzero()[0].tolist()
        # Few tokens spell a tag. Without a preference for them a text would rarely be complete.
        tags = [token for token in allowed if "<" in str(tokenizer.convert_ids_to_tokens(token))]
        token = draw.choice(tags if tags and draw.random() < 0.3 else allowed)
        if token == tokenizer.eos_token_id:
            return ids, True
        constraint.take(token)
        ids.append(token)
    return ids, False


def parses(grammar: str, text: str, *, complete: bool, spaced: bool) -> bool:
    """Whether a text, byte by byte, is one of the grammar's, or the beginning of one.

    The limits on tokens are raised: here a token is a byte.
    """
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    single = token_view.Vocabulary(
        tokens=[*(bytes([byte]) for byte in range(256)), b""],
        special_token_ids=[256],
        eos_token_id=256,
    )
    grammar = re.sub(r"max_tokens=\d+", "max_tokens=99999", grammar)
    reader = LLTokenizer(TokenizerWrapper(single), eos_token=256)
    matcher = LLMatcher(reader, token_view.NO_FORCING + grammar, log_level=0)
    text += " " * spaced
    taken = matcher.try_consume_tokens(list(text.encode()))
    return taken == len(text.encode()) and (matcher.is_accepting() or not complete)


def quoted_rollout(tokenizer: Any, ids: Any) -> tuple[str, list[bytes]]:
    pieces = TokenBytes(tokenizer).of(ids)
    assert b"".join(pieces).decode(errors="replace") == decode(tokenizer, ids)
    return decode(tokenizer, ids), pieces


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_a_grammar_allows_parses_and_quotes_the_rollout(made: Any, data: Any) -> None:
    sampled = data.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=15))
    rollout, pieces = quoted_rollout(made, sampled)
    grammar = verbatim_grammar(rollout, min_words=1, max_tokens=10_000, spaced=ends_words(made))
    assume(grammar is not None)
    ids, complete = walk(made, str(grammar), seed=data.draw(st.integers(0, 9)))
    text = decode(made, ids)
    spaced = ends_words(made)
    assert parses(str(grammar), text, complete=complete, spaced=spaced), text
    if "</error_quote>" in text:
        parsed = parse_reflection(QUOTE + text, correct=False)
        assert parsed.quote is not None and parsed.quote in rollout
        assert locate(parsed.quote, pieces) is not None
        assert parsed.well_formed or not complete


def follow(tokenizer: Any, grammar: str, ids: list[int]) -> Constraint | None:
    """The state after these ids; None: the grammar does not allow them."""
    constraint = constraint_of(tokenizer, grammar)
    for token in ids:
        if not allowed_tokens([constraint], len(tokenizer) + EXTRA)[0, token]:
            return None
        constraint.take(token)
    return constraint


def test_the_first_and_the_last_words_of_a_rollout_can_be_quoted(made: Any) -> None:
    """As the tokenizer itself writes them: the first token of a text is another one within it."""
    rollout, _ = quoted_rollout(made, made.encode("add the ones", add_special_tokens=False))
    for quote in (rollout, rollout.split()[0], rollout.split()[-1]):
        grammar = verbatim_grammar(rollout, min_words=1, max_tokens=99, spaced=ends_words(made))
        answer = f"{quote}</error_quote> <explanation>the ones</explanation>"
        if ends_words(made):
            answer = f"{quote} </error_quote> <explanation> the ones </explanation>"
        ids = made.encode(answer, add_special_tokens=False)
        assert follow(made, str(grammar), ids) is not None, quote


def test_sentences_are_numbered(made: Any) -> None:
    grammar = str(sentence_grammar([3], max_tokens=99, spaced=ends_words(made)))
    for seed in range(5):
        ids, _ = walk(made, grammar, seed=seed)
        parsed = parse_reflection(
            SENTENCE + decode(made, ids), correct=False, sentences=["a", "b", "c"]
        )
        assert parsed.sentence == 3


def test_special_tokens_are_no_text(made: Any) -> None:
    grammar = explanation_grammar(max_tokens=99, spaced=ends_words(made))
    end = made.eos_token_id
    others = [token for token in made.all_special_ids if token != end]
    constraint = constraint_of(made, grammar)
    for _ in range(3):
        allowed = allowed_tokens([constraint], len(made) + EXTRA)[0]
        assert not allowed[others].any() and not allowed[end] and not allowed[len(made) :].any()
        constraint.take(int(allowed.nonzero()[0][0]))


def test_thoughts_may_come_first(made: Any) -> None:
    backend = type(made.backend_tokenizer).from_str(made.backend_tokenizer.to_str())
    backend.add_special_tokens(["<think>", "</think>"])
    own = wrapped(backend)
    think = Think(tokens=("<think>", "</think>"))
    spaced = ends_words(own)
    grammar = str(sentence_grammar([3], max_tokens=99, think=think, spaced=spaced))
    ids: list[Any] = [own.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")]
    opening, closing = ids
    allowed = allowed_tokens([constraint_of(own, grammar)], len(own))[0]
    assert allowed[opening] and not allowed[closing]
    thought = own.encode("the ones", add_special_tokens=False)
    state = follow(own, grammar, [opening, *thought, closing])
    assert state is not None and not allowed_tokens([state], len(own))[0, [opening, closing]].any()


def test_rows_begin_at_different_times(made: Any) -> None:
    """A copy remembers whether its text has begun, and stop tokens may differ from row to row."""
    compiler = GrammarCompiler(made, len(made))
    end, other = made.eos_token_id, made.convert_tokens_to_ids("3")
    grammar = explanation_grammar(max_tokens=99, spaced=ends_words(made))
    rows = [compiler.constraint(grammar, stops, where="row") for stops in ([end], [end, other])]
    alone = [allowed_tokens([row], len(made))[0] for row in rows]
    assert (allowed_tokens(rows, len(made)) == alone).all()
    copied = rows[0].copy()
    rows[0].take(int(alone[0].nonzero()[0][-1]))
    both = allowed_tokens([rows[0], copied], len(made))
    assert (both[1] == alone[0]).all()


def test_llguidance_is_not_believed_where_it_is_wrong(metaspace_tokenizer: Any) -> None:
    """It takes the mark of a space for the character ▁ where Metaspace follows byte fallback."""
    with pytest.raises(UserError, match=r"llguidance.*takes token \d+, b' .* Set engine\.kind"):
        token_view.check_served(metaspace_tokenizer, [metaspace_tokenizer.eos_token_id])
    grammar = verbatim_grammar("The answer is 4.", min_words=2, max_tokens=99)
    ids = metaspace_tokenizer.encode(
        "answer is</error_quote> <explanation>", add_special_tokens=False
    )
    assert follow(metaspace_tokenizer, str(grammar), ids) is not None


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece_tokenizer"])
def test_what_a_server_reads(request: Any, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    token_view.check_served(tokenizer, [tokenizer.eos_token_id])


def test_what_a_server_cannot_read(made: Any) -> None:
    with pytest.raises(UserError, match=r"a server uses, cannot read it.*Set engine\.kind to loc"):
        token_view.check_served(made, [made.eos_token_id])


def test_a_vocabulary_that_cannot_spell_the_tags(made: Any) -> None:
    check_spelling(TokenBytes(made))
    from tokenizers import Tokenizer, models

    with pytest.raises(UserError, match=r"tokenizer: grammars cannot follow WordPiece.*mode to f"):
        constraint_of(word_pieces(), 'start: "a"')
    backend = Tokenizer(models.WordLevel({"add": 0, "<unk>": 1, ">": 2}, unk_token="<unk>"))
    with pytest.raises(UserError, match=r"tokenizer: its tokens cannot spell </error_quote>"):
        check_spelling(TokenBytes(wrapped(backend)))
