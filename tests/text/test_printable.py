"""What is shown of a text never moves the cursor, and never turns the direction of text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.text.printable import one_line, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 ½\n\tnext", "plain é 漢 ½\n\tnext"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\u202eb\u200b", "a\\u202eb\\u200b"),
        ("a\rb\x85", "a\\rb\\x85"),
        ("half \ud800", "half \\ud800"),
        ("wide\u00a0\u3000space", "wide\u00a0\u3000space"),
        ("[bold]not markup[/bold]", "[bold]not markup[/bold]"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(codec=None)))
def test_nothing_that_acts_is_left(text: str) -> None:
    for shown in (printable(text), one_line(text, 40)):
        left = {unicodedata.category(c) for c in shown if c not in "\n\t"}
        assert not left & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
        shown.encode()
    assert printable(text, keep="").count("\n") == 0


@given(st.text(), st.integers(8, 60))
def test_one_line_fits(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert len(line) <= limit
    assert "\n" not in line


def test_one_line_marks_a_cut() -> None:
    assert one_line("a  b\nc", 8) == "a b c"
    assert one_line("word " * 10**6, 12) == "word word..."
    assert one_line("x" * 9, 8) == "xxxxx..."


@given(st.text(), st.integers(2, 30))
def test_a_shortened_text_keeps_both_ends(text: str, limit: int) -> None:
    shown = shortened(text, limit)
    assert len(shown) <= limit and "\n" not in shown
    whole = shortened(text, 10**9)
    if len(whole) > limit:
        start, _, end = shown.partition("…") if "…" not in whole else (whole[:1], "", whole[-1:])
        assert whole.startswith(start) and whole.endswith(end)
    else:
        assert shown == whole
