"""Keep a library from executing an answer that it should only read.

Some scorers of reasoning_gym pass an answer to `eval`, or to sympy's `parse_expr`, which does so
itself. While the guard is up, a text is compiled only if it is plain: numbers, texts, lists,
arithmetic, and calls of functions of mathematics. Python tells of every compilation by an audit
event, so it does not matter who compiles, nor what a text became on its way. In plain text no
attribute is read, nothing is imported, and only the names of `NAMES` are called, so nothing can be
reached from it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = frozenset(
    "Symbol Integer Float Rational Function Add Mul Pow Abs abs round float int factorial "
    "factorial2 sqrt root exp log ln sin cos tan sec csc cot asin acos atan sinh cosh tanh "
    "asinh acosh atanh pi oo True False None".split()
)
"""Names that plain text may use, beside those of one letter."""

TRUSTED = ("from sympy import *", b"from sympy import *")
"""What sympy's `parse_expr` itself executes, before it comes to a text."""

_PLAIN = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.Starred, ast.keyword),
    *(ast.List, ast.Tuple, ast.Set, ast.Dict, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
)


class Refused(Exception):
    """A text was to be compiled that is not plain."""


class Guard:
    """Whether a guard is up in this process, and what it has refused."""

    def __init__(self) -> None:
        self.is_up = False
        self.has_refused = False
        self._is_hooked = False

    @contextmanager
    def up(self) -> Iterator[Guard]:
        """Keep the guard up for the duration of a block."""
        if not self._is_hooked:  # a hook stays for good, so there is one, which does nothing mostly
            sys.addaudithook(self._audit)
            self._is_hooked = True
        self.is_up, self.has_refused = True, False
        try:
            yield self
        finally:
            self.is_up = False

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.is_up or event != "compile":
            return
        source, file = arguments
        if file == "<unknown>" or str(file).endswith(".py"):
            return  # it is only parsed, as by ast.literal_eval; or a module is being imported
        if source in TRUSTED:
            return
        if not isinstance(source, str | bytes) or not is_plain(source):
            self.has_refused = True
            raise Refused("an answer cannot be executed")


GUARD = Guard()


def is_plain(source: str | bytes) -> bool:
    """Whether a text can be evaluated without reaching anything.

    >>> is_plain("Symbol('x') + sqrt(2)"), is_plain("().__class__"), is_plain("exec('1')")
    (True, False, False)
    """
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_plain_node(node) for node in ast.walk(tree))


def _is_plain_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in NAMES or len(node.id) == 1
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    return isinstance(node, _PLAIN)
