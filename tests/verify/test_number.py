"""`number`: every form it reads, and every form that could be another number."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.types import WRONG
from rosd_fast.verify import VERIFIERS, is_verifiable
from rosd_fast.verify.quantity import parse_quantity


def score(found: str, answer: str) -> float:
    return VERIFIERS["number"](f"Steps.\n<answer>{found}</answer>", answer).score


EQUAL = [
    # plain, as before there were units
    ("42", "42"),
    (" 42. ", "42"),
    ("+42", "42.0"),
    ("- 7", "-7"),
    ("\u22127", "-7"),
    ("1,234,567", "1234567"),
    ("1 234", "1234"),
    ("1,234.50", "1234.5"),
    (".5", "1/2"),
    ("0.5", " 2 / 4"),
    ("-3/4", "-0.75"),
    ("-0", "0"),
    ("007", "7"),
    # exponents
    ("1e-7", "0.0000001"),
    ("0.00001", "1e-05"),
    ("42e0", "42"),
    ("1.5E3", "1500"),
    (r"1.5 \times 10^{3}", "1500"),
    ("1.5\u00d710^-3", "0.0015"),
    ("1.5*10^3 m", "1500"),
    # LaTeX and Markdown
    (r"\frac12", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"$\dfrac{1}{2}$", "0.5"),
    (r"-\tfrac{3}{4}", "-0.75"),
    (r"\frac{-3}{4}", "-3/4"),
    (r"\boxed{72}", "72"),
    (r"$$\boxed{72}$$", "72"),
    (r"\(72\)", "72"),
    (r"\text{72}", "72"),
    ("**72**", "72"),
    ("`72`", "72"),
    (r"1{,}234", "1234"),
    (r"1,\!234", "1234"),
    (r"1\,234", "1234"),
    # said
    ("The answer is 42.", "42"),
    ("The final answer is: $42$.", "42"),
    ("Answer: 42", "42"),
    ("x = 42", "42"),
    # money and units
    ("$1,234", "1234"),
    (r"\$1,234.50", "1234.5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("5 \u20ac", "5"),
    ("$5", "5 dollars"),
    ("72 clips", "72"),
    (r"72\text{ clips}", "72"),
    ("72", "72 clips"),
    ("72 Clip", "72 clips"),
    ("1/2 cup", "0.5"),
    ("60 miles per hour", "60"),
    ("60 km/h", "60 km/h"),
    ("16 square feet", "16"),
    ("16 cm^2", "16 cm\u00b2"),
    ("5km", "5"),
    ("90\u00b0", "90"),
    (r"90^\circ", "90"),
    ("25 \u00b0C", "25"),
    (r"25^\circ\text{C}", "25\u00b0C"),
    (r"90^{\circ}", "90 degrees"),
    ("7 months", "7"),
    # percentages
    ("50%", "50"),
    ("50%", "0.5"),
    (r"50\%", "1/2"),
    ("50 percent", "50%"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("0.5%", "0.005"),
    ("100%", "1"),
    ("0%", "0"),
    ("150%", "150"),
]

NOT_A_NUMBER = [
    "",
    ".",
    "-",
    "six",
    "not 42",
    "42 or 43",
    "42 or so",
    "42 and 43",
    "42, 43",
    "42 43",
    "4 2",
    "4,2",
    "42,00",
    "0,042",
    "4,20,000",
    "1,042 000",
    "42-43",
    "42 - 43",
    "42/",
    "/42",
    "42/1/2",
    "1/0",
    "4.2.0",
    "$4.200.000",
    "2042-01-05",
    "1/5/2042",
    "42:00",
    "42:1",
    "42!",
    "42?",
    "(42)",
    "[42]",
    "{42}",
    "--42",
    "+-42",
    "-$-42",
    "\u00b142",
    "42 \u00b1 1",
    "\u224842",
    "~42",
    "about 42",
    "at least 42",
    "42 or more",
    "42 million",
    "42 hundredths",
    "42 dozen",
    "42 halves",
    "42k",
    "42M",
    "42m",
    "42 k",
    "42x",
    "42 x",
    "42 n",
    "42i",
    "42 pi",
    "42 squared",
    "42^2",
    "42 of 50",
    "42 pm",
    "42 below zero",
    "42 less than that",
    "42nd",
    "42\u00b0x",
    "42 ft 3 in",
    "42'3",
    "$42%",
    "$42$5",
    "42 $ 5",
    "42%-50%",
    "42 percent of it",
    "x = y = 42",
    "x = 42 or x = 43",
    "42 forty-two",
    "42 (43)",
    "42 = 43",
    "41 + 1",
    "42e",
    "e42",
    "42e1/2",
    "1e999999999",
    "1e-999999999",
    "1e" + "0" * 90 + "1e5",
    "42e99999",
    r"42 \times 10^{9999}",
    "1 1/2",
    r"1\frac{1}{2}",
    r"1\frac{100}{3}",
    r"\frac12345",
    r"\frac{1}{0}",
    r"\frac{1}{}",
    r"\frac{1}",
    r"\sqrt{1764}",
    "**42** or **43**",
    "$42$ or $43$",
    r"\text{42} or \text{43}",
    r"\boxed{42} or \boxed{43}",
    "x = 41 = 42",
    "The answer is not 42",
    "0x2a",
    "4_2",
    "NaN",
    "inf",
    "\u0664\u0662",
    "\u00bd",
    "42\u00b2",
    "42" + "0" * 300,
]

UNEQUAL = [
    ("41", "42"),
    ("-42", "42"),
    ("1234", "1.234"),
    ("1,234", "1.234"),
    ("0.1", "0.10000001"),
    ("0.333", "1/3"),
    ("1e-7", "1e-8"),
    ("1e-7", "0"),
    # units: two that differ, also when the numbers are equal
    ("72 m", "72 cm"),
    ("y = 72", "x = 72"),
    ("72 hours", "72 minutes"),
    ("$72", "72 \u20ac"),
    ("72 cents", "$72"),
    ("72%", "72 clips"),
    ("60 miles", "60 miles per hour"),
    ("25\u00b0C", "25\u00b0F"),
    ("25%", "25\u00b0"),
    # percentages: one reading for each bare number
    ("0.5%", "0.5"),
    ("0.5", "0.5%"),
    ("1%", "1"),
    ("250%", "2.5"),
    ("5000%", "50"),
    ("50%", "5"),
]


@pytest.mark.parametrize(("found", "answer"), EQUAL)
def test_equal_numbers(found: str, answer: str) -> None:
    assert score(found, answer) == 1.0
    assert is_verifiable("number", answer)


@pytest.mark.parametrize("found", NOT_A_NUMBER)
def test_what_may_mean_another_number_is_refused(found: str) -> None:
    assert parse_quantity(found) is None
    judged = VERIFIERS["number"](f"<answer>{found}</answer>", "42")
    assert judged.score == 0.0 and judged.answer == found
    assert judged.reason is not None and judged.reason.startswith("not a number: ")


@pytest.mark.parametrize(("found", "answer"), UNEQUAL)
def test_unequal_numbers(found: str, answer: str) -> None:
    assert parse_quantity(found) is not None
    assert score(found, answer) == 0.0


def test_reasons() -> None:
    verify = VERIFIERS["number"]
    assert verify("It is 42", "42").reason == "no answer tag"
    assert verify("It is <answer>42", "42").reason == "the answer tag is not closed"
    assert verify("<answer>six</answer>", "6").reason == "not a number: 'six'"
    assert verify("<answer>41</answer>", "42").reason == WRONG
    assert verify("<answer>42 m</answer>", "42 cm").reason == "the unit m is not the one asked for"
    assert verify("<answer>42</answer>", "42").reason is None
    assert (
        verify(f"<answer>{'9x' * 500}</answer>", "42").reason == f"not a number: '{'9x' * 30}...'"
    )


def test_a_number_outside_of_an_answer_does_not_count() -> None:
    assert VERIFIERS["number"]("The answer is 42", "42").answer is None


def test_numbers_of_json_data_are_accepted_as_answers() -> None:
    for value in (0.00001, 1e-300, 1.7976931348623157e308, 5e-324, 1e22, -0.0, 12, 10**60):
        assert is_verifiable("number", str(value)), value
        assert score(str(value), str(value)) == 1.0


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_compared_exactly(top: int, bottom: int) -> None:
    for text in (
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"$\dfrac{{{top}}}{{{bottom}}}$",
    ):
        quantity = parse_quantity(text)
        assert quantity is not None and quantity.value == Fraction(top, bottom)
    for text in (f"{top:,}.", f"${top:,}", f"{top} clips", f"{top}e0", rf"\boxed{{{top}}}"):
        assert score(text, f"{top}") == 1.0
        assert score(text, f"{top + 1}") == 0.0


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_as_decimals(value: float) -> None:
    for text in (repr(value), f"{value:.17e}"):
        quantity = parse_quantity(text)
        assert quantity is not None and quantity.value == Fraction(text)


@given(st.text("0123456789.,-+/ e%$\\{}fracxm", max_size=12))
def test_whatever_is_read_is_what_python_reads(text: str) -> None:
    """Where the text is a number of Python's, it is read as the same number or not at all."""
    quantity = parse_quantity(text)
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return
    assert quantity is None or quantity.value == value


SEPARATORS = (" or ", ", ", ";", "-", " - ", " to ", " and ", "..", " = ", "\n", "  ", " ~ ", ":")


@given(
    st.integers(0, 10**4), st.integers(0, 10**4), st.sampled_from(SEPARATORS), st.sampled_from("ab")
)
def test_two_numbers_are_never_one_of_them(one: int, two: int, joint: str, unit: str) -> None:
    for text in (f"{one}{joint}{two}", f"{one} {unit}{joint}{two} {unit}", f"${one}{joint}${two}"):
        assert parse_quantity(text) is None
