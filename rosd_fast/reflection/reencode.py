"""Where ROSD's public code believes that a quote begins: a known bug, kept to reproduce its runs.

That code decodes the rollout, looks for the quote in the text, tokenizes the text before it once
more, and takes the number of those tokens. Text before a quote usually ends in a space, which
byte-level BPE joins to the next word, but which is a token of its own at the end of a text. So the
span begins one token late, and the first wrong token is not trained:

    sampled        3| x| 7| =| 2|1|.| 2|1| +| 9| =| 2|0|.
    quote                            21 + 9 = 20            begins in token 7
    text before    3| x| 7| =| 2|1|.|<space>                8 tokens

`locate.locate` finds the sampled tokens themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rosd_fast.text.decode import decode


def reencoded_start(tokenizer: Any, completion_ids: Sequence[int], quote: str) -> int | None:
    """The number of tokens of the re-tokenized text before the first occurrence of `quote`.

    At most the number of sampled tokens, in which case no token is trained. None when the quote is
    missed, with and without the whitespace around it.
    """
    text = decode(tokenizer, completion_ids)
    for wanted in dict.fromkeys((quote, quote.strip())):
        place = text.find(wanted) if wanted else -1
        if place >= 0:
            before = tokenizer.encode(text[:place], add_special_tokens=False)
            return min(len(before), len(completion_ids))
    return None
