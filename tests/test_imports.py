"""The packages of rosd_fast import each other in one direction only."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rosd_fast
import rosd_kernels
from tests.import_graph import graph

PACKAGE = Path(rosd_fast.__file__).parent

LAYERS = (
    "errors types stats threads narrow background",
    "files text verify quickstart",
    "config",
    "utils data rollout batch report",
    "reflection",
    "model run_lock stop",
    "engines trainer",
    "methods memory_plan",
    "machine",
    "inputs",
    "pipeline evaluation run",
    "update",
    "train dry_run",
    "commands",
    "cli",
    "__main__",
)
"""From the bottom up. A package or module imports from the rows above its own, and nothing else."""

APART = (("engines.local", "engines.sglang"),)
"""Packages of which neither imports the other."""


def violations(modules: dict[str, set[str]], layers: tuple[str, ...] = LAYERS) -> list[str]:
    """Return every import against the layers, as in `text.prompts imports train`."""
    level = {name: row for row, names in enumerate(layers) for name in names.split()}
    found = []
    for module, used in modules.items():
        for other in used:
            (_, *path), (_, *other_path) = module.split("."), other.split(".")
            if not path or not other_path or path[0] == other_path[0]:
                continue
            if level[path[0]] <= level[other_path[0]]:
                found.append(f"{'.'.join(path)} imports {'.'.join(other_path)}")
    return sorted(found)


def test_every_package_has_a_layer_and_imports_lower_ones_only() -> None:
    modules = graph(PACKAGE)
    names = {module.split(".")[1] for module in modules if "." in module}
    assert names == set(" ".join(LAYERS).split())
    assert violations(modules) == []


def test_no_import_circles() -> None:
    modules = graph(PACKAGE)
    assert set(TopologicalSorter(modules).static_order()) == set(modules)


def test_packages_that_stay_apart() -> None:
    modules = graph(PACKAGE)
    for pair in APART:
        for own, other in (pair, pair[::-1]):
            crossing = {
                module: used
                for module, imported in modules.items()
                if module.startswith(f"rosd_fast.{own}.")
                for used in imported
                if used.startswith(f"rosd_fast.{other}.")
            }
            assert not crossing


def test_the_kernels_never_import_the_trainer() -> None:
    sources = Path(rosd_kernels.__file__).parent.rglob("*.py")
    assert [file for file in sources if "rosd_fast" in file.read_text()] == []


@pytest.mark.parametrize("line", ["from rosd_fast.train import train", "import rosd_fast.inputs"])
def test_an_import_upwards_is_found(tmp_path: Path, line: str) -> None:
    """A lazy one, too; one for type checkers is allowed."""
    package = tmp_path / "rosd_fast"
    (package / "text").mkdir(parents=True)
    for name in ("train", "inputs", "errors"):
        (package / f"{name}.py").touch()
    lazy = f"def f():\n    {line}\n"
    (package / "text" / "a.py").write_text(lazy)
    (package / "text" / "b.py").write_text(f"if TYPE_CHECKING:\n    {line}\n")
    assert [text.split()[0] for text in violations(graph(package))] == ["text.a"]
