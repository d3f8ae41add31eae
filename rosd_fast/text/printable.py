r"""Text from data, as it may be shown: characters that do not print are escaped.

A prompt may contain what moves a terminal's cursor, hides text or turns its direction. It is shown
as "\x1b[2J", "\u202e".
"""

from __future__ import annotations

SPACES = "\u0020\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
SPACES += "\u202f\u205f\u3000"


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""`text` with every character escaped that does not print, but for spaces and `keep`.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    plain = SPACES + keep
    return "".join(
        c if c.isprintable() or c in plain else c.encode("unicode_escape").decode() for c in text
    )


def shortened(text: str, limit: int) -> str:
    """`text` on a line of at most `limit` characters, without the middle of a longer one.

    Names that differ in their ends alone stay different: "eval-run-…-000010".
    """
    line = printable(" ".join(text.split()), keep="")
    if len(line) <= limit:
        return line
    start = (limit - 1) // 2
    return f"{line[:start]}…{line[len(line) - (limit - 1 - start) :]}"


def one_line(text: str, limit: int) -> str:
    """`text` on a line of at most `limit` characters, its line ends and tabs as spaces.

    A longer one ends in "...".
    """
    start = text[: 4 * limit]
    line = printable(" ".join(start.split()), keep="")
    whole = len(start) == len(text) and len(line) <= limit
    return line if whole else f"{line[: limit - 3]}..."
