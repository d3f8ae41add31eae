"""Which module imports which, read from the source.

Lazy imports count, imports for type checkers do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each import, inside functions too; name is "" for `import module`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((name.name, "") for name in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from ((child.module, name.name) for name in child.names)
        yield from imports(child)


def graph(package: Path) -> dict[str, set[str]]:
    """Return the modules of `package` that each of its modules imports.

    `from package import module` is an import of the module, not of the package's own content.
    """
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts): file
        for file in package.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): file for name, file in files.items()}

    def used_by(file: Path) -> set[str]:
        found = imports(ast.parse(file.read_text()))
        longest = (
            f"{module}.{name}" if f"{module}.{name}" in names else module for module, name in found
        )
        return {module for module in longest if module in names}

    return {name: used_by(file) - {name} for name, file in names.items()}
