"""Grammars that constrain how a reflection is decoded.

    verbatim   <error_quote>words of the rollout</error_quote><explanation>...</explanation>
    sentence   <error_sentence>7</error_sentence><explanation>...</explanation>
    correct    <explanation>...</explanation>, for a correct rollout

The opening tag is fixed, so it ends the prompt instead of being sampled; the grammar covers what
follows. Only when thoughts may come first is the opening tag sampled.

A grammar is a text in llguidance's dialect of Lark, which the local engine and SGLang (field
`ebnf`, grammar backend llguidance) both read. `substring_words` accepts only runs of words of a
given text, so every quote occurs in the rollout. A quote that contains its own closing tag is
excluded, because it could not be parsed. If the rollout has a word so long that it might not end
within the quote's tokens (a protein, text without spaces), quotes may be cut within words.

The explanation is free text up to its closing tag or up to its share of the tokens.

The argument `think` says which thoughts come first; None: there are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.text.token_bytes import TokenBytes

QUOTE, SENTENCE, EXPLANATION = "<error_quote>", "<error_sentence>", "<explanation>"
CLOSING_TAGS = ("</error_quote>", "</error_sentence>", "</explanation>")
# The characters of str.isspace(); llguidance's \s is a different set.
BLANK = r"\t-\r\x1c-\x20\x85\xa0\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}"
LONG_WORD = 32  # characters; a longer word, if also longer than a quote's tokens, may be cut
WORD_OR_BLANK = re.compile(r"\s+|\S+")
PIECE = re.compile(r"\s+|\S{1,8}")
WORD_CHARS = 5  # characters per word, for the minimum length of a quote where words may be cut
QUOTE_FRAC = 0.4  # the quote's share of a reflection's tokens
TAG_TOKENS = 32  # reserved for the tags, which may take a token per character or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Think:
    """Thoughts before a reflection.

    tokens: those of the tags <think> and </think> that are tokens of their own.
    opened: whether the prompt ends within thoughts, which are then closed and not opened again;
        otherwise there may be thoughts or none.
    """

    tokens: Collection[str] = ()
    opened: bool = False


def opening_tag(mode: str, *, correct: bool, think: Think | None = None) -> str:
    """The tag that ends the prompt of a reflection in `mode`; empty when the tag is sampled."""
    if mode == "free" or think is not None:
        return ""
    if correct:
        return EXPLANATION
    return QUOTE if mode == "verbatim" else SENTENCE


def verbatim_grammar(
    rollout: str,
    *,
    min_words: int,
    max_tokens: int,
    think: Think | None = None,
    spaced: bool = False,
) -> str | None:
    """The grammar of mode verbatim for a wrong rollout; None when it has no words to quote.

    min_words: minimum number of words in a quote, or all words of a shorter rollout.
    max_tokens: maximum number of tokens in the whole reflection.
    spaced: whether spaces follow words and tags in the tokens of their ends (`ends_words`).
    """
    parts = rollout.split("</error_quote>")
    num_words = max(len(part.split()) for part in parts)
    if num_words == 0:
        return None
    quote, explanation = _budgets(max_tokens)
    longest = max(map(len, rollout.split()))
    more = min(min_words, num_words) - 1
    several_words = rf"/[{BLANK}]*[^{BLANK}]+([{BLANK}]+[^{BLANK}]+){{{more},}}[{BLANK}]*/"
    if spaced:
        text = f'"substring_chunks": {json.dumps(WORD_OR_BLANK.findall(f"{rollout} "))}'
        terms = [several_words]
    elif longest <= max(LONG_WORD, quote):
        text = f'"substring_words": {json.dumps(rollout)}'
        terms = [several_words]
    else:
        text = f'"substring_chunks": {json.dumps(PIECE.findall(rollout))}'
        fewest = min(min_words * WORD_CHARS, max(len(part) for part in parts if part.strip()))
        terms = [f"/(?s:.{{{fewest},}})/", f"/(?s:.*[^{BLANK}].*)/"]
    if len(parts) > 1:  # rarely needed, and each term takes time to compile
        terms.append(r"~/(?s:.*<\/error_quote>.*)/")
    return _grammar(
        QUOTE,
        f'quote {"SPACE " * spaced}"</error_quote>" SPACE explanation',
        f"quote[max_tokens={quote}]: {' & '.join(['TEXT', *terms])}",
        f"TEXT: %regex {{ {text} }}",
        explanation_tokens=explanation,
        think=think,
        spaced=spaced,
    )


def sentence_grammar(
    numbers: Collection[int],
    *,
    max_tokens: int,
    think: Think | None = None,
    spaced: bool = False,
) -> str | None:
    """The grammar of mode sentence; `numbers` are the sentences shown, None when there are none.

    spaced: as for `verbatim_grammar`.
    """
    if not numbers:
        return None
    names = " | ".join(f'"{number}"' for number in sorted(numbers))
    return _grammar(
        SENTENCE,
        f'number {"SPACE " * spaced}"</error_sentence>" SPACE explanation',
        f"number: {names}",
        explanation_tokens=_budgets(max_tokens)[1],
        think=think,
        spaced=spaced,
    )


def explanation_grammar(
    *, max_tokens: int, think: Think | None = None, spaced: bool = False
) -> str:
    """The grammar for a correct rollout. spaced: as for `verbatim_grammar`."""
    explanation = max(1, max_tokens - TAG_TOKENS)
    return _grammar(EXPLANATION, "text", explanation_tokens=explanation, think=think, spaced=spaced)


def check_spelling(token_bytes: TokenBytes) -> None:
    """Raise UserError unless tokens can spell the tags of a reflection."""
    pieces = set(token_bytes.vocabulary().values())
    for tag in (*CLOSING_TAGS, EXPLANATION):
        if not any(_spells(pieces, text.encode()) for text in (tag, f" {tag}", f"{tag} ")):
            raise UserError(
                f"its tokens cannot spell {tag}",
                where="tokenizer",
                fix="Add the tags of reflections to it as tokens, or choose another --method",
            )


def _spells(pieces: Collection[bytes], text: bytes) -> bool:
    """Whether some of the pieces, one after the other, are the text."""
    ends = {0}  # of texts that pieces spell
    for first in range(len(text)):
        if first in ends:
            ends |= {end for end in range(first + 1, len(text) + 1) if text[first:end] in pieces}
    return len(text) in ends


def _grammar(
    tag: str,
    start: str,
    *rules: str,
    explanation_tokens: int,
    think: Think | None,
    spaced: bool,
) -> str:
    """The grammar with opening tag `tag`, which is part of it only when thoughts may come first."""
    text = r"\s*[^\s<].*" if spaced else ".+"  # a space is the tag's, no explanation
    start += " SPACE" * spaced
    if think is not None:
        thoughts = "thoughts" if think.opened else "thoughts?"
        start = f'{thoughts} "{tag}" {"SPACE " * spaced}{start}'
    lines = ["%llguidance {}", f"start: {start}", *rules]
    if think is not None:
        # In the grammar, special tokens are written without quotation marks.
        opening = '("<think>" | <think>) ' if "<think>" in think.tokens else '"<think>" '
        opening = "" if think.opened else opening
        if "</think>" in think.tokens:
            lines += [f"thoughts: {opening}/(?s:.*)/ </think> SPACE"]
        else:
            lines += [f"thoughts: {opening}thought SPACE"]
            lines += ['thought[suffix="</think>"]: /(?s:.*)/']
    lines += [
        r"SPACE: /\s{0,2}/",
        'explanation: "<explanation>" text',
        f'text[suffix="</explanation>", max_tokens={explanation_tokens}]: /(?s:{text})/',
    ]
    return "\n".join(lines) + "\n"


def _budgets(max_tokens: int) -> tuple[int, int]:
    """(tokens for the quote, tokens for the explanation)."""
    left = max(2, max_tokens - TAG_TOKENS)
    quote = max(1, int(QUOTE_FRAC * left))
    return quote, left - quote
