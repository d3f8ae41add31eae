"""Split what a model writes into sentences: prose with formulas, numbers, code and lists.

A sentence ends after `.`, `!`, `?` (or `。`, `！`, `？`) and the closing quotes and brackets after
it, if whitespace or the end of the text follows; and before a newline. No sentence ends

    inside a formula          $...$, $$...$$, \\(...\\), \\[...\\], \\begin{x}...\\end{x}
    inside a line of code     between ``` and ```, and within `...`; only a newline ends those
    at a decimal point        3.5 (no whitespace follows)
    after an abbreviation     e.g. i.e. Fig. Eq. Dr.; after etc. al. approx. no. when the next word
                              begins with a lower-case letter or a digit
    after the number of a step, at the start of a line: "2. Add", "Step 2. Add", "B. Mercury"
    in an ellipsis before a lower-case word

Splitting takes one pass, linear in the text. All positions are bytes of UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ABBREVIATIONS = (
    "e.g i.e cf vs Dr Mr Mrs Ms Prof St Fig Figs Eq Eqs Ref Refs Sec Ch Tab Def Thm Lem Prop resp"
).split()
AMBIGUOUS = "etc al approx ca no nos inc ltd co vol pp".split()  # these may end a sentence
CLOSERS = {
    b"$$": b"$$",
    b"\\(": b"\\)",
    b"\\[": b"\\]",
    b"```": b"```",
}
WHITESPACE = b" \t\n\r\f\v"

MARK = re.compile(
    rb"""
    (?P<fence>```)
    |(?P<open>\$\$|\\\(|\\\[|\\begin\{(?P<name>[A-Za-z*]{1,40})\})
    |(?P<math>\$(?=\S)[^$\n]*(?<=\S)\$(?!\d))
    |(?P<code>`[^`\n]+`)
    |(?P<newline>\n)
    |(?P<end>(?<![.!?])(?:[.!?]|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)++
        (?:["')\]}*_]|\xe2\x80\x99|\xe2\x80\x9d|\xc2\xbb)*+(?=\s|\Z)
        |(?:\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)++)
    """,
    re.VERBOSE,
)
LAST_WORD = re.compile(rb"[A-Za-z.]+\Z")
STEP = re.compile(rb"[ \t]*(?:[-*>#]+[ \t]*)?(?:\*\*)?(?:[Ss]tep[ \t]+)?(?:\d{1,3}|[A-Za-z])\.\Z")


def sentences(text: bytes) -> list[tuple[int, int]]:
    """The byte ranges of the sentences, in order, less the whitespace around them."""
    ranges, start = [], 0
    for end in (*_ends(text), len(text)):
        piece = text[start:end]
        first = start + len(piece) - len(piece.lstrip(WHITESPACE))
        if piece := piece.strip(WHITESPACE):
            ranges.append((first, first + len(piece)))
        start = end
    return ranges


def _ends(text: bytes) -> Iterator[int]:
    """The positions where sentences end, in ascending order."""
    closing = _Closing(text)
    place = line = 0
    in_code = False
    while (mark := MARK.search(text, place)) is not None:
        place = mark.end()
        kind = mark.lastgroup if mark.lastgroup != "name" else "open"
        if kind == "newline":
            yield mark.start()
            line = place
        elif kind == "fence":
            in_code = not in_code
        elif in_code:
            continue
        elif kind == "open":
            name = mark["name"]
            closer = CLOSERS[mark[0]] if name is None else b"\\end{" + name + b"}"
            place = closing.after(closer, place) or place
        elif kind == "end" and not _continues(text, line, mark.start(), place):
            yield place


class _Closing:
    """Finds where formulas close. A failed search is never repeated, so it stays linear."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.found: dict[bytes, int] = {}  # the last match of each closer; -1: no more

    def after(self, closer: bytes, start: int) -> int | None:
        """The end of the first `closer` from `start` on; None when a blank line comes before it."""
        place = self.found.get(closer, 0)
        if place >= 0 and place < start:
            place = self.found[closer] = self.text.find(closer, start)
        if place < 0:
            return None
        blank = self.found.get(b"\n\n", 0)
        if blank >= 0 and blank < start:
            blank = self.found[b"\n\n"] = self.text.find(b"\n\n", start)
        if 0 <= blank < place:
            return None
        return place + len(closer)


def _continues(text: bytes, line: int, start: int, end: int) -> bool:
    """Whether the sentence continues after text[start:end], in the line that starts at `line`."""
    mark = text[start:end]
    if not mark.startswith(b"."):
        return False
    following = text[end : end + 64].lstrip(b" \t\r")[:1]
    if mark.startswith(b"..") and following.islower():
        return True
    if mark != b".":
        return False
    if len(text[max(line, start - 40) : start]) < 40 and STEP.match(text, line, end):
        return True
    word = LAST_WORD.search(text, max(line, start - 16), start)
    name = word[0].decode() if word else ""
    name = name.lstrip(".")
    if name in ABBREVIATIONS or name.lower() in ("e.g", "i.e"):
        return True
    return name[:1].lower() + name[1:] in AMBIGUOUS and (following.islower() or following.isdigit())
