"""Find the answer that a completion gives between `<answer>` and `</answer>`."""

from __future__ import annotations

OPEN, CLOSE = "<answer>", "</answer>"


def last_answer(completion: str) -> str | None:
    """The stripped text of the last closed answer tag; None when there is none. Takes linear time.

    >>> last_answer("<answer>4</answer> no, <answer> 5 </answer>")
    '5'
    """
    for part in reversed(completion.split(OPEN)[1:]):
        text, closed, _ = part.partition(CLOSE)
        if closed:
            return text.strip()
    return None
