"""Find the final answer that a worked solution of a data set ends with."""

from __future__ import annotations

import re

from rosd_fast.verify.tags import BOXED, HASHES, boxed_range

_ANNOTATION = re.compile(r"<<[^<>=\n]*=[^<>\n]*>>")
_BARE = re.compile(r"\\boxed\s*([^\s{}$\\][^\s{}$]*)")


def after_hashes(text: str) -> str | None:
    """What follows `####` in the last line; None when nothing does.

    >>> after_hashes("2 + 3 = <<2+3=5>>5\\n#### 5")
    '5'
    """
    last_line = text.rstrip().rpartition("\n")[2]
    return last_line.rpartition(HASHES)[2].strip() or None if HASHES in last_line else None


def before_hashes(text: str) -> str:
    """The solution before the last `####`, without GSM8K's `<<2+3=5>>` annotations."""
    return _ANNOTATION.sub("", text.rpartition(HASHES)[0]).strip()


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}`; None when it is absent or not closed.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}."), last_boxed(r"so $\boxed 9$.")
    ('\\frac{1}{2}', '9')
    """
    text = text.replace(r"\fbox", BOXED)
    start, end = boxed_range(text)
    last = text.rfind(BOXED)
    if last > end:  # without braces, or cut off
        bare = _BARE.match(text, last)
        return bare[1].rstrip(".,;") if bare else None
    return text[start:end].strip() or None
