"""What a reflection may look like, as a grammar that is enforced while it is sampled.

    verbatim   <error_quote>words of the rollout</error_quote><explanation>...</explanation>
    sentence   <error_sentence>7</error_sentence><explanation>...</explanation>
    right      <explanation>...</explanation>, of a correct rollout

The tag that opens a reflection is no choice, so it is not sampled: it stands at the end of the
prompt, and the grammar is that of what follows. Only where thoughts may come first is it sampled.

A grammar is a text in llguidance's dialect of Lark; both the local engine and SGLang (field `ebnf`,
grammar backend llguidance) take it. `substring_words` accepts nothing but runs of words of a given
text, so that a quote which is not in the rollout cannot be written. A quote that holds its own
closing tag cannot either: it could not be read back. Where a word is so long that it might not end
within the tokens there are (a protein, text without spaces), it may be quoted in pieces.

The explanation is free text up to its closing tag, or up to its share of the tokens. Thoughts may
come first where `think` is given: the names of those of the tags <think> and </think> that are
tokens of their own, as in reasoning models; an empty tuple if neither is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

QUOTE, SENTENCE, EXPLANATION = "<error_quote>", "<error_sentence>", "<explanation>"
Think = Collection[str] | None  # None: no thoughts
WORD = re.compile(r"\S+")
# What str.isspace() says: llguidance's \s is another set.
BLANK = r"\t-\r\x1c-\x20\x85\xa0\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}"
LONG_WORD = 32  # characters; a word of more, and of more than a quote's tokens, is cut into pieces
PIECE = re.compile(r"\s+|\S{1,8}")
WORD_CHARS = 5  # where words are cut, a quote's least length is so many characters a word
QUOTE_FRAC = 0.4  # of a reflection's tokens may go to the quote
TAG_TOKENS = 32  # for tags, when each of their characters is a token or two


def opening_tag(mode: str, *, correct: bool, think: Think = None) -> str:
    """What ends the prompt of a reflection in `mode`: its first tag, or nothing."""
    if mode == "free" or think is not None:
        return ""
    if correct:
        return EXPLANATION
    return QUOTE if mode == "verbatim" else SENTENCE


def verbatim_grammar(
    rollout: str, *, min_words: int, max_tokens: int, think: Think = None
) -> str | None:
    """Of a reflection on a wrong rollout; None where there are no words that it could quote.

    min_words: of a quote, or as many as the rollout has. max_tokens: of the whole reflection.
    """
    parts = rollout.split("</error_quote>")
    num_words = max(len(WORD.findall(part)) for part in parts)
    if num_words == 0:
        return None
    quote, explanation = _budgets(max_tokens)
    longest = max(map(len, WORD.findall(rollout)))
    if longest <= max(LONG_WORD, quote):
        text = f'"substring_words": {json.dumps(rollout)}'
        more = min(min_words, num_words) - 1
        terms = [rf"/[{BLANK}]*[^{BLANK}]+([{BLANK}]+[^{BLANK}]+){{{more},}}[{BLANK}]*/"]
    else:
        text = f'"substring_chunks": {json.dumps(PIECE.findall(rollout))}'
        fewest = min(min_words * WORD_CHARS, max(len(part) for part in parts if part.strip()))
        terms = [f"/(?s:.{{{fewest},}})/", f"/(?s:.*[^{BLANK}].*)/"]
    if len(parts) > 1:  # seldom, and each term takes its time to compile
        terms.append(r"~/(?s:.*<\/error_quote>.*)/")
    return _grammar(
        QUOTE,
        'quote "</error_quote>" SPACE explanation',
        f"quote[max_tokens={quote}]: {' & '.join(['TEXT', *terms])}",
        f"TEXT: %regex {{ {text} }}",
        explanation_tokens=explanation,
        think=think,
    )


def sentence_grammar(
    numbers: Collection[int], *, max_tokens: int, think: Think = None
) -> str | None:
    """Of a reflection that names one of the sentences shown; None where none is."""
    if not numbers:
        return None
    names = " | ".join(f'"{number}"' for number in sorted(numbers))
    return _grammar(
        SENTENCE,
        'number "</error_sentence>" SPACE explanation',
        f"number: {names}",
        explanation_tokens=_budgets(max_tokens)[1],
        think=think,
    )


def explanation_grammar(*, max_tokens: int, think: Think = None) -> str:
    """Of a reflection on a correct rollout."""
    explanation = max(1, max_tokens - TAG_TOKENS)
    return _grammar(EXPLANATION, "text", explanation_tokens=explanation, think=think)


def _grammar(tag: str, start: str, *rules: str, explanation_tokens: int, think: Think) -> str:
    """tag: opens the reflection; it is in the grammar only where thoughts may stand before it."""
    if think is not None:
        start = f'thoughts? "{tag}" {start}'
    lines = ["%llguidance {}", f"start: {start}", *rules]
    if think is not None:
        # Tokens of their own are no text, and are written without quotation marks.
        opening = '("<think>" | <think>)' if "<think>" in think else '"<think>"'
        if "</think>" in think:
            lines += [f"thoughts: {opening} /(?s:.*)/ </think> SPACE"]
        else:
            lines += [f"thoughts: {opening} thought SPACE"]
            lines += ['thought[suffix="</think>"]: /(?s:.*)/']
    lines += [
        r"SPACE: /\s{0,2}/",
        'explanation: "<explanation>" text',
        f'text[suffix="</explanation>", max_tokens={explanation_tokens}]: /(?s:.+)/',
    ]
    return "\n".join(lines) + "\n"


def _budgets(max_tokens: int) -> tuple[int, int]:
    """Tokens of the quote, and of the explanation."""
    left = max(2, max_tokens - TAG_TOKENS)
    quote = max(1, int(QUOTE_FRAC * left))
    return quote, left - quote
