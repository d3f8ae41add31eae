r"""`math` on pairs of answers: what is equal, what is not, and where math-verify errs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.types import WRONG
from rosd_fast.verify import VERIFIERS, is_verifiable
from rosd_fast.verify.latex import compare_notation, simplify
from rosd_fast.verify.math import why_unequal
from rosd_fast.verify.values import compare_values, values

sympy = pytest.importorskip("sympy")
pytest.importorskip("math_verify")

EQUAL = [
    # fractions and numbers
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\tfrac{3}{4}", "3/4"),
    (r"1\frac12", r"\frac32"),
    ("12,345", "12345"),
    ("033", "33"),
    ("33", "033"),
    (r"1.5\times 10^3", "1500"),
    ("10^{-7}", "0.0000001"),
    ("2^{-3}", r"\frac18"),
    ("0.333333", r"\frac13"),
    ("6.283185", r"2\pi"),
    ("6!", "720"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    ("2:3", r"\frac23"),
    # radicals, pi, infinity, complex numbers
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\infty", r"+\infty"),
    ("3+2i", "2i+3"),
    # lists, points, sets, intervals, matrices
    ("-1,3", "3, -1"),
    (r"\pm 3", "-3, 3"),
    (r"1\text{ or }2", "1,2"),
    (r"\left(\frac12, 3\right)", "(0.5,3)"),
    (r"(1,\sqrt{4})", "(1,2)"),
    ("1,2", "(1,2)"),  # a point without its brackets
    (r"\{1,2,3\}", r"\{3,1,2\}"),
    (r"\emptyset", r"\{\}"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty,3]", r"\left(-\infty, 3\right]"),
    (r"(-\infty,0)\cup[1,2]", r"[1,2]\cup(-\infty,0)"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # expressions, equations, inequalities
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sin^2x+\cos^2x", "1"),
    ("x=3", "3"),
    ("3", "x=3"),
    ("5+7=12", "12"),
    ("y=2x+1", "y=1+2x"),
    ("a=1,b=2", "b=2,a=1"),
    ("x>3", r"(3,\infty)"),
    (r"(3,\infty)", "x>3"),
    # percentages, units, degrees, money
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"12\text{ cm}", "12"),
    (r"5\sqrt{2}\text{ cm}", r"5\sqrt2"),
    ("12", r"12\text{ cm}"),
    (r"90^\circ", "90"),
    (r"\$5.50", "5.5"),
    ("1011", "1011_2"),
    # words and letters
    (r"\text{east}", r"\text{East}"),
    ("east", r"\text{east}"),
    (r"\textbf{(C)}", "C"),
    ("C", r"\text{(C)}"),
]

UNEQUAL = [
    ("33", "330"),
    ("-33", "33"),
    ("0.333", r"\frac13"),
    (r"\frac12", r"\frac21"),
    ("1 1/2", "11/2"),
    ("2^{-3}", "-8"),
    ("1e-7", "1e-8"),
    ("0.0000001", "0.0000002"),
    ("0.0000001", "0"),
    (r"10^{-7}\sqrt2", r"2\cdot10^{-7}"),
    ("1.41", r"\sqrt{2}"),
    ("3.14", r"\pi"),
    (r"\frac{\pi}{4}", r"\frac{\pi}{3}"),
    (r"\infty", r"-\infty"),
    ("3-2i", "3+2i"),
    ("(1,2)", "(2,1)"),
    ("(1,2,3)", "(1,2)"),
    ("1,2", "(2,1)"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"(2,1)", r"\{1,2\}"),
    ("[0,1)", "[0,1]"),
    ("(0,1)", "[0,1]"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    ("x^2+1", "(x+1)^2"),
    ("y=3", "x=3"),
    ("x=3", "x=-3"),
    ("a=1,b=2", "a=2,b=1"),
    (r"x\ge3", "x>3"),
    (r"(3,\infty)", "x<3"),
    (r"0.5\%", "0.5"),
    (r"50\%", "5"),
    (r"12\text{ m}", r"12\text{ cm}"),
    (r"\sqrt{2}\text{ m}", r"\sqrt{2}\text{ cm}"),
    ("11_2", "11"),
    ("11_2", "11_8"),
    (r"\text{west}", r"\text{east}"),
    ("seat", "east"),
    ("on", "no"),
    ("B", "C"),
    (r"\text{None}", "0"),
    ("x", "0"),
    # more than one answer, or half of one
    ("12 or 13", "12"),
    ("12, 13", "12"),
    ("12", "12,13"),
    (r"\text{12 or 13}", "12"),
    (r"\pm3", "3"),
    ("3", r"\pm3"),
    ("not 12", "12"),
    ("13=12", "12"),
    ("5-7", "5"),
    ("3 4", "34"),
    ("1,23", "1.23"),
    ("1,23", "123"),
    ("1.2.3", "1.2"),
    ("2024-01-05", "2024"),
]

LIBRARY_SAYS_UNEQUAL = [
    (r"0.\overline{3}", r"\frac13"),
    (r"180^\circ", r"\pi"),
    ("3x=6", "x=2"),
    (r"e^{i\pi}", "-1"),
    ("i", r"\sqrt{-1}"),
]
"""Equal, and refused; docs/verifiers.md names them. When math-verify learns one, the test fails."""


@pytest.mark.parametrize(("found", "answer"), EQUAL)
def test_equal(found: str, answer: str) -> None:
    assert why_unequal(found, answer) is None
    assert VERIFIERS["math"](f"So it is $\\boxed{{{found}}}$.", answer).score == 1.0
    assert is_verifiable("math", answer) and is_verifiable("math", f"${answer}$")


@pytest.mark.parametrize(("found", "answer"), UNEQUAL)
def test_unequal(found: str, answer: str) -> None:
    assert why_unequal(found, answer) is not None
    assert why_unequal(answer, answer) is None


@pytest.mark.parametrize(("found", "answer"), LIBRARY_SAYS_UNEQUAL)
def test_where_the_library_errs(found: str, answer: str) -> None:
    assert why_unequal(found, answer) is not None


@pytest.mark.parametrize(
    "found",
    [
        "9^{9^{9^9}}",
        "2^{2^{2^{2^{2^2}}}}",
        "99999999^{99999999}",
        "1000000!",
        r"\binom{1000000}{500000}",
        "(" * 60 + "1" + ")" * 60,
        "{" * 60 + "x" + "}" * 60,
        "x+" * 3000 + "x",
        "x^{" * 30 + "x" + "}" * 30,
    ],
)
def test_what_would_take_hours_is_refused_but_equal_to_itself(found: str) -> None:
    assert why_unequal(found, "7") is not None
    if len(found) < 500:
        assert why_unequal(found, found) is None


def test_places() -> None:
    verify = VERIFIERS["math"]
    assert verify(r"\boxed{\frac{1}{2}}", "0.5").answer == r"\frac{1}{2}"
    assert verify("<answer>1/2</answer>", "0.5").score == 1.0
    assert verify(r"<answer>\boxed{1/2}</answer>", "0.5").score == 1.0
    assert verify(r"<answer>2</answer>, no: \boxed{1/2}", "0.5").score == 1.0
    assert verify(r"\boxed{2} <answer>1/2</answer>", "0.5").score == 1.0
    assert verify("so\n#### 1/2", "0.5").score == 1.0
    assert verify("The answer is 1/2", "0.5").answer is None


def test_reasons() -> None:
    verify = VERIFIERS["math"]
    assert verify("1/2", "0.5").reason == r"no \boxed{} and no answer tag"
    assert verify(r"\boxed{1/2", "0.5").reason == "the answer is not closed"
    assert verify(r"\boxed{}", "0.5").reason == "the answer is empty"
    assert verify(r"\boxed{1/3}", "0.5").reason == WRONG
    assert verify(r"\boxed{0.\overline{3}}", "x").reason is not None
    long = verify(rf"\boxed{{{'x+' * 1000}x}}", "0.5")
    assert long.reason == "an answer of 2001 characters cannot be compared"


@given(st.integers(-(10**6), 10**6), st.integers(2, 999))
def test_numbers_need_no_algebra(top: int, bottom: int) -> None:
    value = rf"\frac{{{top}}}{{{bottom}}}"
    assert compare_notation(value, f"{top}/{bottom}") is True
    assert compare_notation(value, f"{top + 1}/{bottom}") is False
    assert compare_notation(f"({top}, {value})", rf"\left({top},{top}/{bottom}\right)") is True
    assert compare_notation(f"({value}, {top})", f"({top}, {value})") is (top == 0)


@given(st.integers(0, 10**6), st.integers(0, 99))
def test_a_space_joins_no_digits(one: int, two: int) -> None:
    assert simplify(f"{one} {two}") != simplify(f"{one}{two}")
    assert compare_notation(f"{one} {two}", f"{one}{two}") is not True
    assert compare_notation(f"\\boxed{{ {one} }}", f"$ {one} $") is True


@pytest.mark.parametrize(("found", "answer"), EQUAL)
def test_values_tell_no_equal_pair_apart(found: str, answer: str) -> None:
    assert compare_values(simplify(found), simplify(answer)) is not False


@pytest.mark.parametrize(("found", "answer"), UNEQUAL)
def test_values_take_no_unequal_pair_for_equal(found: str, answer: str) -> None:
    if compare_notation(found, answer) is None:
        assert compare_values(simplify(found), simplify(answer)) is not True


@pytest.mark.parametrize(
    ("found", "answer", "is_equal"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("x(x+5)", "x^2+5x", True),
        ("(x-1)(x+1)", "x^2-1", True),
        (r"2\pi r", r"r\cdot2\pi", True),
        (r"\sqrt[3]{8}", "2", True),
        ("2^{-3}", r"\frac{1}{8}", True),
        ("x+1", "y+1", None),
        (r"5\sqrt{2}cm", r"5\sqrt{2}", None),
        ("x+2y", "y+2x", False),
        ("x^2", "x^3", False),
        ("x^2+5x", "x^2+6x", False),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        (r"\sqrt{x^2}", "x", False),
        ("10^{12}+1", "10^{12}", None),
        ("10^{16}+1", "10^{16}", None),
        ("9999999^2", "9999998*10000000+1", None),
        ("10^{20}", "10^{21}", False),
        (r"4000001\sqrt{7}", r"\sqrt{7}\cdot4000001", True),
        (r"4000001\sqrt{7}", r"4000002\sqrt{7}", None),
        (r"400001\sqrt{7}", r"400002\sqrt{7}", False),
        ("10^{-12}", "10^{-13}", None),
        (r"\frac{1000000000001}{1000000000000}\pi", r"\pi", None),
    ],
)
def test_values(found: str, answer: str, is_equal: bool | None) -> None:
    assert compare_values(found, answer) is is_equal


@pytest.mark.parametrize(
    "text",
    "1/2x|1\\frac{1}{2}|x2|f(x)|2e|3i|x^23|x^2^3|1.5|1,2|x=2|3!|(1|1)|\\sin x|\\pir|2--3|x y|3 4||+"
    "|\\frac12|\\sqrt{-4}|(-8)^{1/3}|9^{9^{9}}|1/0|\\sqrt[0]{2}|\\sqrt[]{2}|[1]".split("|"),
)
def test_what_has_two_readings_or_none_has_no_values(text: str) -> None:
    assert values(text) is None


LEAVES = st.sampled_from(
    [("2", sympy.Integer(2)), ("7", sympy.Integer(7)), (r"\pi", sympy.pi)]
    + [(name, sympy.Symbol(name)) for name in "xyn"]
)
Term = tuple[str, Any]


def grown(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    """Expressions of two others, as LaTeX and as sympy has them."""
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda p: (f"({p[0][0]}+{p[1][0]})", p[0][1] + p[1][1])),
        pair.map(lambda p: (f"({p[0][0]}-({p[1][0]}))", p[0][1] - p[1][1])),
        pair.map(lambda p: (rf"{p[0][0]}\cdot({p[1][0]})", p[0][1] * p[1][1])),
        pair.map(lambda p: (f"({p[0][0]})({p[1][0]})", p[0][1] * p[1][1])),
        pair.map(lambda p: (rf"\frac{{{p[0][0]}}}{{{p[1][0]}}}", p[0][1] / p[1][1])),
        inner.map(lambda p: (f"({p[0]})^2", p[1] ** 2)),
        inner.map(lambda p: (f"({p[0]})^{{-3}}", p[1] ** -3)),
        inner.map(lambda p: (rf"\sqrt{{{p[0]}}}", sympy.sqrt(p[1]))),
    )


@settings(deadline=None, max_examples=60)
@given(st.recursive(LEAVES, grown, max_leaves=5))
def test_values_are_those_of_sympy(term: Term) -> None:
    latex, expression = term
    found = values(latex)
    if found is None:  # a root of a negative number, a division by 0
        return
    symbols = {name: values(name) for name in "xyn"}
    for index, value in enumerate(found):
        at = {sympy.Symbol(name): each[index].real for name, each in symbols.items() if each}
        assert abs(complex(expression.evalf(30, subs=at)) - value) <= 1e-9 * max(1, abs(value))
