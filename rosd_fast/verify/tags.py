r"""Find the answer of a completion: in `<answer>` and `</answer>`, in `\boxed{}`, or after ####.

All of this takes linear time, whatever the text.
"""

from __future__ import annotations

import re

OPEN, CLOSE = "<answer>", "</answer>"
BOXED = "\\boxed"
HASHES = "####"

TAG_MARKS = (OPEN, BOXED, f"after {HASHES}", f'"{HASHES}"', f"`{HASHES}`")
"""What a prompt contains that says already how to answer a verifier that calls `find_answer`."""

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def find_answer(completion: str) -> str | None:
    r"""The text of the last closed answer tag, or else of the last `\boxed{}`, or else after ####.

    None: there is none of the three.

    >>> find_answer("So \\boxed{4}. <answer>5</answer>"), find_answer("It is 5.\n#### 5")
    ('5', '5')
    """
    found = last_answer(completion)
    if found is None:
        found = last_boxed(completion)
    return last_hashes(completion) if found is None else found


def final_answer(completion: str) -> str | None:
    r"""The text of the answer tag or the `\boxed{}` that is closed last, or else after ####.

    >>> final_answer("<answer>4</answer>, no: \\boxed{5}.")
    '5'
    """
    start, end = max(tag_range(completion), boxed_range(completion), key=lambda found: found[1])
    return completion[start:end].strip() if end >= 0 else last_hashes(completion)


def last_answer(completion: str) -> str | None:
    """The stripped text of the last closed answer tag; None when there is none.

    >>> last_answer("<answer>4</answer> no, <answer> 5 </answer>")
    '5'
    """
    start, end = tag_range(completion)
    return completion[start:end].strip() if end >= 0 else None


def tag_range(completion: str) -> tuple[int, int]:
    """[start, end) of the text in the last closed answer tag; (-1, -1) for none."""
    end = len(completion)
    while (start := completion.rfind(OPEN, 0, end)) >= 0:
        close = completion.find(CLOSE, start, end)
        if close >= 0:
            return start + len(OPEN), close
        end = start
    return -1, -1


def last_boxed(completion: str) -> str | None:
    r"""The stripped text of the `\boxed{}` that is closed last; None when there is none.

    >>> last_boxed("First \\boxed{3}, then \\boxed{\\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start, end = boxed_range(completion)
    return completion[start:end].strip() if end >= 0 else None


def boxed_range(completion: str) -> tuple[int, int]:
    r"""[start, end) of the text in the `\boxed{}` that is closed last; (-1, -1) for none."""
    found = (-1, -1)
    first = completion.find(BOXED)
    if first < 0:
        return found
    opened: list[int] = []  # where the text of an open box begins; -1: any other brace
    for match in _BRACES.finditer(completion, first):
        text = match[0]
        if text.startswith(BOXED):
            opened.append(match.end())
        elif text == "{":
            opened.append(-1)
        elif text == "}" and opened and (start := opened.pop()) >= 0:
            found = (start, match.start())
    return found


def last_hashes(completion: str) -> str | None:
    """What follows #### in the last line that is not blank; None when it does not begin with ####.

    In any other line it is a heading.
    """
    line = completion.rstrip().rpartition("\n")[2].strip()
    return line[len(HASHES) :].strip() if line.startswith(HASHES) else None


def last_line(completion: str) -> str | None:
    """The last line, stripped, which is the answer where none is marked; None for a blank text."""
    return completion.strip().rpartition("\n")[2].strip() or None


def why_no_answer(completion: str) -> str:
    """Why `find_answer` found none, for a reader who was told to answer in a tag."""
    return "the answer tag is not closed" if OPEN in completion else "no answer tag"


def quoted(text: str, limit: int = 60) -> str:
    """`text` in quotes and on one line, cut to `limit` characters, for a reason."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")
