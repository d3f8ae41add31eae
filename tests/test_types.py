"""What the records say about themselves."""

from __future__ import annotations

import pytest

from rosd_fast.types import MAX_QUOTED_CHARS, WRONG, Verdict


@pytest.mark.parametrize(
    ("success", "answer", "reason", "feedback"),
    [
        (True, "4", None, ""),
        (False, "5", None, "The answer 5 is wrong."),
        (False, "5", WRONG, "The answer 5 is wrong."),
        (False, "5 m", "another unit", "The answer 5 m is wrong: another unit."),
        (False, None, None, "No answer was found."),
        (False, None, "timed out after 10 s", "Timed out after 10 s."),
        (False, "two\nlines", "test 3 fails", "The answer is wrong: test 3 fails."),
        (False, "x" * (MAX_QUOTED_CHARS + 1), WRONG, "The answer is wrong."),
    ],
)
def test_the_feedback_says_why_where_the_verifier_does(
    success: bool, answer: str | None, reason: str | None, feedback: str
) -> None:
    verdict = Verdict(
        rollout_id="a/0", score=float(success), success=success, answer=answer, reason=reason
    )
    assert verdict.feedback == feedback
