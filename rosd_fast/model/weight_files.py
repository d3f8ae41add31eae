"""The safetensors files of a model: which ones there are, and their tensors by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils.hub import cached_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(source: Path | str) -> list[Path]:
    """The files of a folder or hub model that hold the weights that transformers loads.

    Raises OSError when there are none.
    """
    index = _cached(source, INDEX, required=False)
    if index is None:
        names = [SINGLE]
    else:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [_cached(source, name, required=True) for name in names]
    return [file for file in files if file is not None]


@contextmanager
def open_weights(source: Path | str) -> Iterator[dict[str, Any]]:
    """Yield each tensor's name with the open file that has it.

    A file's `get_tensor(name)` and `get_slice(name)` read; until then it is mapped into memory.
    """
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in weight_files(source):
            file = stack.enter_context(safe_open(path, framework="pt"))
            found |= dict.fromkeys(file.keys(), file)
        yield found


def _cached(source: Path | str, name: str, *, required: bool) -> Path | None:
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=required,
        _raise_exceptions_for_connection_errors=required,
    )
    return None if found is None else Path(found)
