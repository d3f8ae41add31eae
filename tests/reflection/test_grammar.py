"""Reflections decoded under their grammar: every quote can be located."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.local.grammar_mask import GrammarCompiler, allowed_tokens, mask_logits
from rosd_fast.errors import UserError
from rosd_fast.reflection.grammar import (
    EXPLANATION,
    QUOTE,
    SENTENCE,
    Think,
    explanation_grammar,
    sentence_grammar,
    verbatim_grammar,
)
from rosd_fast.reflection.locate import locate
from rosd_fast.reflection.parse import parse_reflection
from rosd_fast.reflection.requests import split_sentences
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import GenerationRequest, SamplingParams

ROLLOUTS = [
    "First, we add 3.5 and 4 to get 8.5. Then we divide by 2. The answer is 4.25.",
    "one",
    "two words",
    'a < b and c > d, "quoted" \\ back\\slash / $x_1^2$ {"a": [1]} `code`\r\n\ttab\x00nul',
    "👩‍👩‍👧‍👦 ok 🏳️‍🌈 naïve e\u0301 שלום עולם \u202eabc 日本語",
    "x </error_quote> then <error_quote>y</error_quote> <explanation>z</explanation> and more",
    "</error_quote></error_quote> a",
    "%llguidance {} start: /x/ \\n \\u0041",
    "long " * 300,
]


@pytest.fixture(scope="module")
def engine(tiny_llama, tokenizer):
    return LocalEngine(tiny_llama(), tokenizer=tokenizer)


def sample(
    engine: LocalEngine,
    tokenizer: Any,
    grammar: str | None,
    *,
    n: int = 6,
    seed: int = 0,
    max_new_tokens: int = 160,
    temperature: float = 1.5,
    opening: str = "",
) -> list[str]:
    request = GenerationRequest(
        id="r",
        prompt_ids=(5, 6, 7),
        params=SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_token_ids=(tokenizer.eos_token_id,),
        ),
        n=n,
        seed=seed,
        grammar=grammar,
    )
    found = asyncio.run(engine.generate([request]))
    return [opening + tokenizer.decode(g.completion_ids, skip_special_tokens=True) for g in found]


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=range(len(ROLLOUTS)))
def test_a_verbatim_quote_is_found(engine, tokenizer, rollout):
    """A random model, which would never write a tag without the grammar."""
    pieces = TokenBytes(tokenizer).of(tokenizer.encode(rollout, add_special_tokens=False))
    grammar = verbatim_grammar(rollout, min_words=3, max_tokens=160)
    assert grammar is not None
    for text in sample(engine, tokenizer, grammar, opening=QUOTE):
        parsed = parse_reflection(text, correct=False)
        assert parsed.quote is not None and parsed.explanation is not None, text
        assert parsed.quote in rollout
        assert locate(parsed.quote, pieces) is not None
        assert "case" not in parsed.tolerated


def test_quotes_have_the_minimum_number_of_words(engine, tokenizer):
    rollout = ROLLOUTS[0]
    for min_words in (1, 4, 100):
        grammar = verbatim_grammar(rollout, min_words=min_words, max_tokens=400)
        options = {"n": 4, "max_new_tokens": 400, "opening": QUOTE}
        for text in sample(engine, tokenizer, grammar, **options):
            quote = parse_reflection(text, correct=False).quote
            assert quote is not None
            assert len(quote.split()) >= min(min_words, len(rollout.split())), quote
            # Words are whole.
            place = rollout.index(quote)
            assert place == 0 or not (rollout[place - 1].isalpha() and rollout[place].isalpha())


@settings(max_examples=25, deadline=None)
@given(
    rollout=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), seed=st.integers(0, 99)
)
def test_random_rollouts(engine, tokenizer, rollout, seed):
    grammar = verbatim_grammar(rollout, min_words=2, max_tokens=120)
    if grammar is None:
        assert not rollout.replace("</error_quote>", "").split()
        return
    options = {"n": 2, "seed": seed, "max_new_tokens": 120, "opening": QUOTE}
    for text in sample(engine, tokenizer, grammar, **options):
        quote = parse_reflection(text, correct=False).quote
        assert quote is None or quote in rollout  # None: nothing but what strip() drops


LONG_WORDS = {
    "protein": "The protein " + "MKTAYIAKQRQISFVKSHFS" * 30 + " folds.",
    "no spaces": "日本語には単語の間に空白がない。" * 30,
    "tags": "x" * 300 + "</error_quote>" + " " * 60 + "</error_quote>" + "y" * 20,
    "one": "z" * 40,
}


@pytest.mark.parametrize("rollout", LONG_WORDS.values(), ids=LONG_WORDS)
def test_a_quote_may_end_within_an_overlong_word(engine, tokenizer, rollout):
    grammar = verbatim_grammar(rollout, min_words=3, max_tokens=120)
    options = {"n": 12, "max_new_tokens": 120, "opening": QUOTE}
    for text in sample(engine, tokenizer, grammar, **options):
        parsed = parse_reflection(text, correct=False)
        assert parsed.quote and parsed.quote in rollout
        assert parsed.explanation


@pytest.mark.parametrize(
    "rollout", ["", " \n\t", "</error_quote>", "</error_quote> </error_quote>"]
)
def test_what_cannot_be_quoted(rollout):
    assert verbatim_grammar(rollout, min_words=1, max_tokens=100) is None


def test_a_sentence_is_named_by_a_valid_number(engine, tokenizer):
    parts = split_sentences(ROLLOUTS[0])
    assert len(parts) == 3
    grammar = sentence_grammar([1, 3], max_tokens=100)
    seen = set()
    options = {"n": 24, "max_new_tokens": 100, "opening": SENTENCE}
    for text in sample(engine, tokenizer, grammar, **options):
        parsed = parse_reflection(text, correct=False, sentences=parts)
        assert parsed.sentence in (1, 3) and parsed.explanation
        assert parsed.quote == parts[parsed.sentence - 1]
        seen.add(parsed.sentence)
    assert seen == {1, 3}
    assert sentence_grammar([], max_tokens=100) is None


def test_explanations_of_correct_rollouts(engine, tokenizer):
    grammar = explanation_grammar(max_tokens=80)
    for text in sample(engine, tokenizer, grammar, max_new_tokens=80, opening=EXPLANATION):
        parsed = parse_reflection(text, correct=True)
        assert parsed.explanation


@pytest.mark.parametrize("tags", [(), ("<think>",), ("<think>", "</think>")])
def test_thoughts_may_come_first(tokenizer, tags):
    """With tags that are tokens, and with tags that are spelled out."""
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(
        tokenizer.backend_tokenizer.to_str().replace("<think>", "<other>")
    )
    backend.add_tokens(list(tags))
    own: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    grammar = explanation_grammar(max_tokens=200, think=Think(tokens=tags))
    compiler = GrammarCompiler(own, len(own))
    for text in (
        "<think>a </b> < c</think>\n<explanation>why</explanation>",
        "<explanation>why</explanation>",
    ):
        constraint = compiler.constraint(grammar, [own.eos_token_id], where="here")
        assert follows(constraint, own.encode(text, add_special_tokens=False), len(own)), text


def test_without_thoughts_the_quote_comes_first(tokenizer):
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    for think, thinks, quotes in ((None, False, False), (Think(tokens=["<think>"]), True, True)):
        grammar = verbatim_grammar("add one", min_words=1, max_tokens=99, think=think)
        for text, allowed in (
            ("<think>a</think><error_quote>", thinks),
            ("<error_quote>add", quotes),
            ("add one</error_quote>", think is None),
        ):
            constraint = compiler.constraint(str(grammar), [tokenizer.eos_token_id], where="here")
            assert follows(constraint, tokenizer.encode(text), len(tokenizer)) == allowed, text


def follows(constraint, ids, vocab_size) -> bool:
    for token in ids:
        if not allowed_tokens([constraint], vocab_size)[0, token]:
            return False
        constraint.take(token)
    return True


def test_a_complete_text_may_only_stop(tokenizer):
    stops: Any = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    compiler = GrammarCompiler(tokenizer, len(tokenizer) + 50)
    constraint = compiler.constraint('start: "ab"', stops, where="here")
    assert follows(constraint, tokenizer.encode("ab"), len(tokenizer))
    assert allowed_tokens([constraint], len(tokenizer) + 50)[0].nonzero()[0].tolist() == sorted(
        stops
    )


def test_rows_without_a_grammar_are_unconstrained(engine, tokenizer):
    """A row does not depend on the other rows of the batch."""
    free = sample(engine, tokenizer, None, n=3, temperature=1.0)
    grammar = verbatim_grammar(ROLLOUTS[0], min_words=1, max_tokens=60)
    params = SamplingParams(max_new_tokens=160, stop_token_ids=(tokenizer.eos_token_id,))
    requests = [
        GenerationRequest(id="r", prompt_ids=(5, 6, 7), params=params, n=3),
        GenerationRequest(id="s", prompt_ids=(5, 6), params=params, n=3, grammar=grammar),
    ]
    found = asyncio.run(engine.generate(requests))
    texts = [tokenizer.decode(g.completion_ids, skip_special_tokens=True) for g in found]
    assert texts[:3] == free
    for text in texts[3:]:
        assert text.partition("</error_quote>")[0] in ROLLOUTS[0]


def test_log_probs_are_of_the_constrained_distribution(tiny_llama, tokenizer):
    model = tiny_llama()
    engine = LocalEngine(model, tokenizer=tokenizer)
    stop = tokenizer.eos_token_id
    params = SamplingParams(max_new_tokens=8, stop_token_ids=(stop,))
    grammar = 'start: "a" ("x" | "y") "d"'
    request = GenerationRequest(id="r", prompt_ids=(5, 6), params=params, grammar=grammar)
    (generation,) = asyncio.run(engine.generate([request]))
    ids = list(generation.completion_ids)
    assert tokenizer.decode(ids[:-1]) in ("axd", "ayd") and ids[-1] == stop
    constraint = GrammarCompiler(tokenizer, model.config.vocab_size).constraint(
        grammar, [stop], where="here"
    )
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, *ids]])).logits[0, 1:-1]
    for row, token in enumerate(ids):
        masked = mask_logits(logits[row : row + 1], [constraint])
        want = masked.log_softmax(-1)[0, token].item()
        assert generation.logprobs[row] == pytest.approx(want, abs=1e-4)
        constraint.take(token)


def test_mistakes(tiny_llama, tokenizer, engine):
    with pytest.raises(ValueError, match=r"request r: the grammar is wrong"):
        sample(engine, tokenizer, "start: nowhere")
    with pytest.raises(
        ValueError, match=r"request r: has a grammar, but the engine has no tokenizer"
    ):
        sample(LocalEngine(tiny_llama()), tokenizer, 'start: "a"')


def test_a_tokenizer_that_cannot_be_read(tiny_llama):
    class Slow:
        eos_token_id = 0

        def __len__(self):
            return 3

    engine = LocalEngine(tiny_llama(), tokenizer=Slow())
    for call in (
        lambda: sample(engine, Slow(), 'start: "a"'),
        lambda: GrammarCompiler(Slow(), 3).check([0]),
    ):
        with pytest.raises(UserError, match=r"tokenizer: Slow has no tokenizer\.json"):
            call()
