r"""Take away the markup around an answer: `**X**`, `$X$`, `\boxed{X}`, `\text{X}`.

Only markup of the whole text goes, so "**12** or **13**" does not become a number.
"""

from __future__ import annotations

import re

_PAIRS = (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_MACRO = re.compile(r"\\(boxed|text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{(.*)\}", re.DOTALL)
MAX_LAYERS = 8  # each costs a pass over the text
WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"
"""Regular expression of words in LaTeX: their text is its only group."""


def unwrap(text: str) -> str:
    r"""`text` without the markup around it, stripped. Takes linear time.

    >>> unwrap(" **\\boxed{\\text{B}}** "), unwrap("**12** or **13**")
    ('B', '**12** or **13**')
    """
    text = text.strip()
    for _ in range(MAX_LAYERS):
        inner = _inner(text)
        if inner is None:
            break
        text = inner.strip()
    return text


def _inner(text: str) -> str | None:
    """What is within the outermost markup; None: the text has no markup around it."""
    for opening, closing in _PAIRS:
        inner = text[len(opening) : -len(closing)]
        is_around = len(text) >= len(opening + closing) and text.startswith(opening)
        if is_around and text.endswith(closing) and inner.strip() and closing not in inner:
            return inner
    match = _MACRO.fullmatch(text)
    return match[2] if match and _is_balanced(match[2]) else None


def _is_balanced(text: str) -> bool:
    r"""Whether every brace closes one before it: not so within `\text{12} or \text{13}`."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0
