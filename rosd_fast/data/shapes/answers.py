"""Find the final answer that a worked solution ends with."""

from __future__ import annotations

import re

HASHES = "####"
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{}$]+)")


def after_hashes(text: str) -> str | None:
    """What follows the last `####` on its line; None when nothing does.

    >>> after_hashes("2 + 3 = <<2+3=5>>5\\n#### 5")
    '5'
    """
    _, found, after = text.rpartition(HASHES)
    return (after.strip().split("\n")[0].strip() or None) if found else None


def before_hashes(text: str) -> str:
    """The solution before the last `####`, without GSM8K's `<<2+3=5>>` annotations."""
    return _ANNOTATION.sub("", text.rpartition(HASHES)[0]).strip()


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, braces counted; None when it is absent or not closed.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    found = boxes[-1]
    if found[1] != "{":  # \boxed 5
        return found[1].rstrip(".,;")
    depth, start = 1, found.end()
    for place in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(place[0], 0)
        if depth == 0:
            return text[start : start + place.start()].strip() or None
    return None
