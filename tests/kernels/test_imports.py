"""The modules of the package import each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rosd_kernels

PACKAGE = Path(rosd_kernels.__file__).parent


def imports(node: ast.AST) -> Iterator[str]:
    """Names that a module imports, inside functions too, but not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{name.name}" for name in child.names)
        yield from imports(child)


def graph(package: Path) -> dict[str, set[str]]:
    """The modules that each module of `package` imports."""
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts): file
        for file in package.rglob("*.py")
    }
    found = {name: set(imports(ast.parse(file.read_text()))) for name, file in files.items()}
    return {name: names & files.keys() for name, names in found.items()}


def test_no_import_circles():
    modules = graph(PACKAGE)
    assert "rosd_kernels.gpu.tiles" in modules["rosd_kernels.backends"]  # a lazy import counts
    order = list(TopologicalSorter(modules).static_order())
    assert set(order) == set(modules)


def test_a_circle_of_lazy_imports_is_found(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("from package import b\n")
    (package / "b.py").write_text("def f():\n    import package.a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(graph(package)).prepare()
