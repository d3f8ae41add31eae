"""Where a verifier's function stands, so that another process can find it.

A function does not travel, its address does: the module or the file, and its name there. A worker
imports the module or loads the file, under a name that is not `__main__`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rosd_fast.errors import UserError

GUARD = 'if __name__ == "__main__":'


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The address of a function.

    module: its module; empty: only the file can be loaded, as for a script.
    file: absolute path of its file; empty: a module that is imported by its name alone.
    function: its name there, with dots inside a class.
    """

    module: str = ""
    file: str = ""
    function: str


def origin_of(function: Callable[..., Any], name: str) -> Origin:
    """The address of the function of the verifier `name`.

    Raises UserError when no other process could find it: a lambda, a function inside a function, or
    one that was typed into an interactive session.
    """
    where, fix = f"the verifier {name}", "Define it at the top level of a file"
    qualified = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if not qualified or "<" in qualified:
        raise UserError("workers cannot import a function without a place", where=where, fix=fix)
    file = getattr(module, "__file__", None)
    if module is None or (module.__name__ == "__main__" and file is None):
        raise UserError("workers cannot import what is in no file", where=where, fix=fix)
    own = module.__spec__.name if module.__spec__ is not None else ""
    return Origin(
        module=own if module.__name__ == "__main__" else module.__name__,
        file="" if file is None else str(Path(file).absolute()),
        function=qualified,
    )


def load_function(origin: Origin) -> tuple[Callable[..., Any], ModuleType]:
    """Import the function and its module. Raises UserError with the line at fault."""
    module = _import(origin)
    found: Any = module
    for part in origin.function.split("."):
        if not hasattr(found, part):
            raise UserError(
                f"has no function {origin.function}",
                where=origin.file or origin.module,
                fix=_suggestion(origin.function, module),
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{origin.function} is not a function", where=origin.file or origin.module)
    return found, module


def _import(origin: Origin) -> ModuleType:
    """The module of the address, under its own name where that leads to the same file."""
    where = origin.file or origin.module
    try:
        if origin.module and (not origin.file or _leads_to(origin.module, origin.file)):
            return importlib.import_module(origin.module)
        return _load_file(Path(origin.file))
    except UserError as error:  # what the file does when it is imported, such as train
        raise UserError(error.what, where=where, fix=error.fix) from None
    except FileNotFoundError as error:
        if error.filename != origin.file:
            raise _raised(error, where) from None
        raise UserError("there is no such file", where=where) from None
    except SyntaxError as error:
        place = f"{error.filename or where}:{error.lineno}"
        raise UserError(f"is not Python: {error.msg}", where=place) from None
    except BaseException as error:  # a script may also call sys.exit
        raise _raised(error, where) from None


def _leads_to(module: str, file: str) -> bool:
    """Whether importing `module` here would load `file`."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin) == Path(file)


def _load_file(path: Path) -> ModuleType:
    """Execute a file as a module. Files beside it can be imported, as from a script."""
    name = path.stem if path.stem not in sys.modules else f"verifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("is not a Python file", where=str(path), fix="Its name must end in .py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _raised(error: BaseException, where: str) -> UserError:
    """What a file raised when it was imported, with the line in it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == where]
    place = f"{where}:{lines[-1]}" if lines else where
    return UserError(f"raises {describe(error)} when it is imported", where=place)


def describe(error: BaseException, limit: int = 200) -> str:
    """An exception in one line: its type and message."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except Exception:  # its class has a `__str__` that fails
        return name
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return f"{name}: {text}" if text else name


def _suggestion(name: str, module: ModuleType) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    near = difflib.get_close_matches(name, own, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"It has {', '.join(own[:5])}" if own else "It has no function at all"
