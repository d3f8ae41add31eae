"""The modules of the package import each other in one direction only."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rosd_kernels
from tests.import_graph import graph

PACKAGE = Path(rosd_kernels.__file__).parent


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
