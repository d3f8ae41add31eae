"""Sentences of texts like those that models write."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.text.sentences import sentences


def split(text: str) -> list[str]:
    data = text.encode()
    return [data[first:last].decode() for first, last in sentences(data)]


@pytest.mark.parametrize(
    "parts",
    [
        ["Add 3.5 to 4.", "Is it 8?", "No!", "It is 7.5.", "So halve it: 3.75"],
        ["The density is 1.2 g/cm3.", "See Fig. 2 and Eq. 3, e.g. the slope.", "Next."],
        ["Use NaCl, KCl, etc. in water.", "Use salts, etc.", "Then stir."],
        ["By Smith et al. 2019 it melts.", "It was seen by Smith et al.", "They measured it."],
        ["Approx. five moles react.", "It is approx. 5.0 mol."],
        ["Sample No. 5 failed.", "Is it right?", "No.", "It is wrong."],
        ["It ends... or not.", "It ends...", "Then it starts again."],
        ['He said "stop."', "Then (it stopped.)", "End"],
        ["**Total.**", "_Done._", "End."],
        ["The energy is $E = m c^2.$ or so.", "End."],
        ["We have $p = 0.5. q = 1$.", "End."],
        ["It costs $5.", "And $6 more."],
        ["Then $$x = 1.\ny = 2.$$ follows.", "End."],
        ["So \\(a. b\\) and \\[c.\n d?\\] hold.", "End."],
        ["\\begin{align} x. \\\\ y? \\end{align} is it.", "End."],
        ["Unclosed \\( here.", "It goes on.", "And $$ too.", "End."],
        ["Call `f(x). y` now.", "End."],
        ["这是第一句。", "这是第二句！", "完？"],
        ["Hello?!", "What..", "Who."],
    ],
)
def test_prose(parts):
    assert split(" ".join(parts)) == parts


@pytest.mark.parametrize(
    "lines",
    [
        ["1. Add the ones.", "2. Carry. ", "10. Done"],
        ["Step 1. Read it.", "step 2. Answer."],
        ["A. Mercury", "B. Venus", "- C. Earth", "## 3. Result"],
        ["```python", "x = a.b. c", "y = 1. + 2. ", "```", "After it."],
        ["First line", "second line\r", "\t third"],
    ],
)
def test_lines(lines):
    expected = {
        "1. Add the ones.": ["1. Add the ones.", "2. Carry.", "10. Done"],
    }
    wanted = expected.get(lines[0], [line.strip() for line in lines])
    assert split("\n".join(lines)) == wanted


def test_a_single_letter_in_prose_ends_a_sentence():
    assert split("The answer is B. It is blue.") == ["The answer is B.", "It is blue."]


def test_a_sentence_from_a_science_question():
    text = (
        "The sample (2.50 g, approx. 0.01 mol) was heated at 85.5 °C for 3 h. According to Eq. 4, "
        "$\\Delta G = -RT \\ln K.$ Hence ΔG < 0.\n\n1. Mass balance: m = 2.5 g.\n2. Therefore "
        "the answer is C.\n"
    )
    assert split(text) == [
        "The sample (2.50 g, approx. 0.01 mol) was heated at 85.5 °C for 3 h.",
        "According to Eq. 4, $\\Delta G = -RT \\ln K.$ Hence ΔG < 0.",
        "1. Mass balance: m = 2.5 g.",
        "2. Therefore the answer is C.",
    ]


@settings(max_examples=300)
@given(st.text("ab3. !?\n$\\()`e.g\t。", max_size=60))
def test_every_character_but_whitespace_is_in_one_sentence(text):
    data = text.encode()
    place = 0
    for first, last in sentences(data):
        assert place <= first < last
        assert not data[place:first].strip()
        piece = data[first:last]
        assert piece == piece.strip()
        piece.decode()
        place = last
    assert not data[place:].strip()


@pytest.mark.parametrize(
    "text",
    ["\\(", "$", "$$", "`", ".", ".)", "\\begin{a}", "a. ", "\n", "etc. ", "```", "。", "1. "],
)
def test_long_hostile_texts(text):
    """A pass that is quadratic in the length would take hours."""
    data = (text * 500_000)[:500_000].encode()
    found = sentences(data)
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    parts = b" ".join(data[a:b] for a, b in found).split()
    assert b"".join(parts) == b"".join(data.split())
