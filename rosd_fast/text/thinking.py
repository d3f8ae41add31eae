"""Thinking: the part of a completion before its answer, between tags such as <think>, </think>.

Where both tags begin with a token of their own, as in most reasoning models, they are found by
token ids; otherwise they are found in the text. Thinking begins in the prompt, where the chat
template opens it, or in the completion, which may also open it again later. The answer begins after
the last closing tag. A completion that opens thinking and never closes it has no answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from rosd_fast.text.decode import decode
from rosd_fast.text.token_bytes import TokenBytes

HEAD_TOKENS = 64  # nearly always tell whether a completion begins with a tag
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """The tags of a family of models."""

    opening: str
    closing: str
    empty: str  # a block without any thinking, as the family writes it before an answer


THINK = Tags(opening="<think>", closing="</think>", empty="<think>\n\n</think>\n\n")
FAMILIES = (
    THINK,
    Tags(opening="[THINK]", closing="[/THINK]", empty="[THINK][/THINK]"),
    Tags(
        opening="<|channel|>analysis<|message|>",
        closing="<|channel|>final<|message|>",
        empty="<|channel|>final<|message|>",
    ),
)


class Thinking:
    """Finds the thinking in the completions of a tokenizer's model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        names = {token: name for name, token in tokenizer.get_added_vocab().items()}

        def ids(tag: str) -> list[int] | None:
            found = tokenizer.encode(tag, add_special_tokens=False)
            # The first one may also be the token of unknown words.
            known = found and found[0] in names and tag.startswith(names[found[0]])
            return found if known else None

        self._ids = {tags: (ids(tags.opening), ids(tags.closing)) for tags in FAMILIES}

    def num_tokens(self, ids: Sequence[int], *, opened: Tags | None) -> int:
        """The number of first tokens of a completion that are thinking, tags included.

        opened: the tags of the thinking that the prompt has opened; None: none.
        """
        for tags in FAMILIES if opened is None else (opened,):
            opening, closing = self._ids[tags]
            if opening and closing:
                number = _by_ids(ids, opening, closing, opened=opened is not None)
            else:
                number = self._by_text(ids, tags, opened=opened is not None)
            if number:
                return number
        return 0

    def last_paragraph(self, ids: Sequence[int], num_thinking: int) -> int:
        """The first token of the last paragraph of `ids[:num_thinking]`, which are thinking."""
        pieces = self._token_bytes.of(ids[:num_thinking])
        text = b"".join(pieces)
        for tags in FAMILIES:
            text = text.removesuffix(tags.closing.encode())
        breaks = list(BLANK_LINE.finditer(text.rstrip()))
        if not breaks:
            return 0
        starts = [0, *accumulate(map(len, pieces))]
        return bisect_left(starts, breaks[-1].end())

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer)

    def _by_text(self, ids: Sequence[int], tags: Tags, *, opened: bool) -> int:
        if not opened and tags is not THINK:
            return 0
        if not opened:
            head = decode(self._tokenizer, ids[:HEAD_TOKENS]).lstrip()
            if len(head) > len(tags.opening) and not head.startswith(tags.opening):
                return 0
        text = decode(self._tokenizer, ids)
        if not opened and not text.lstrip().startswith(tags.opening):
            return 0
        if text.rfind(tags.closing) <= text.rfind(tags.opening):
            return len(ids)
        pieces = self._token_bytes.of(ids)
        data, closing = b"".join(pieces), tags.closing.encode()
        ends = list(accumulate(map(len, pieces)))
        return bisect_left(ends, data.rindex(closing) + len(closing)) + 1


def _by_ids(ids: Sequence[int], opening: list[int], closing: list[int], *, opened: bool) -> int:
    first, last = _last(ids, opening), _last(ids, closing)
    if first < 0 and not opened:
        return 0
    return len(ids) if last <= first else last + len(closing)


def _last(ids: Sequence[int], part: list[int]) -> int:
    """The last place of `part` in `ids`; -1: it does not occur."""
    backwards, wanted, at = ids[::-1], part[::-1], 0
    while True:
        try:  # `index` compares in C, ten times faster than a loop over all places
            at = backwards.index(wanted[0], at)
        except ValueError:
            return -1
        if [*backwards[at : at + len(wanted)]] == wanted:
            return len(ids) - at - len(wanted)
        at += 1
