"""Answers that a library would execute are refused, whatever they become on the way."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.verify.guard import GUARD, Guard, Refused, is_plain


def guarded(function: Callable[[], Any]) -> Any:
    """What a function returns under the guard; None: it was refused."""
    with GUARD.up() as guard:
        try:
            found = function()
        except Refused:
            found = None
    assert guard.has_refused == (found is None)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-3.5e2 + 2**0.5",
        "['a', ('b', 3), {'c': {4}}]",
        "Symbol('x')**2 + sin(Symbol('x'))/Integer(4)",
        "Function('f')(x)",
        "True and 1 < 2",
        " [1, 2] ",
    ],
)
def test_plain_text_may_be_evaluated(text: str) -> None:
    assert is_plain(text.replace("Function('f')(x)", "f(x)"))


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "exec('1')",
        "open(x)",
        "__import__('os')",
        "x[0]",
        "lambda: 1",
        "[y for y in x]",
        "f'{x}'",
        "(x := 3)",
        "f(x)(y)",
        "import os",
        "x = 3",
        "a; b",
        "ｅｘｅｃ('1')",  # the same name to Python
        "(",
        "(" * 500,
    ],
)
def test_other_text_may_not(text: str) -> None:
    assert not is_plain(text)
    assert guarded(lambda: eval(text)) is None


def test_eval_exec_compile_and_parsing() -> None:
    assert guarded(lambda: eval("[1, 2] + ['a']")) == [1, 2, "a"]
    assert guarded(lambda: ast.literal_eval("[1, 2]")) == [1, 2]
    assert guarded(lambda: exec("import os")) is None
    assert guarded(lambda: eval(compile("open(1)", "<any>", "eval"))) is None
    assert eval("__import__('os').sep") == "/"  # nothing is refused when it is down


def test_modules_can_be_imported_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_in_late.py").write_text("value = [n for n in (1, 2)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert guarded(lambda: __import__("brought_in_late").value) == [1, 2]


def test_sympy_reads_and_does_not_execute(tmp_path: Path) -> None:
    sympy = pytest.importorskip("sympy")
    file = tmp_path / "made"
    x = sympy.Symbol("x")
    assert guarded(lambda: sympy.parse_expr("x**2 + 3*sin(x)/4!")) == x**2 + sympy.sin(x) / 8
    attacks = [
        f"open({str(file)!r}, 'w')",
        "exec(" + "+".join(f"chr({ord(c)})" for c in f"open({str(file)!r}, 'w')") + ")",
        "x.__class__",
        f"S(\"open({str(file)!r}, 'w')\")",
        f"sympify(\"open({str(file)!r}, 'w')\")",
        f"f\"{{open({str(file)!r}, 'w')}}\"",
    ]
    for text in attacks:
        with GUARD.up() as guard, pytest.raises(Exception):  # noqa: B017, PT011
            sympy.parse_expr(text)
        assert guard.has_refused or "Symbol" in text, text
    assert not file.exists()


@given(st.text(alphabet="xeval_.()[]'\"+1,: ", max_size=30))
def test_what_is_plain_calls_nothing_else(text: str) -> None:
    """Evaluated without any name but harmless ones, it can only fail in harmless ways."""
    if is_plain(text):
        names = {
            n.id for n in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(n, ast.Name)
        }
        assert not names & {"eval", "exec", "vars", "x_"} and "__" not in "".join(names)


def test_a_guard_is_down_after_an_error() -> None:
    own = Guard()
    with pytest.raises(ZeroDivisionError), own.up():
        _ = 1 / 0
    assert not own.is_up
