"""Block sizes that were measured on a device, in place of those of configs.py.

They are read from `tuned.json` beside this file, which belongs to the source like configs.py does:
nothing is measured at run time. `scripts/gpu_day_one.sh` writes such a file, docs/gpu.md says how
it becomes a commit. An entry holds for one compute capability and one version of Triton, whose
compilers decide about registers; without an entry, configs.py does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import triton

from rosd_kernels.gpu.configs import Config, Kernel, Precision

FILE = Path(__file__).with_name("tuned.json")
FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "max_registers", "group")

Key = tuple[str, int, str, str, bool]  # kernel, capability, Triton's version, precision, lean
_forced: dict[Kernel, Config] = {}


def tuned(kernel: Kernel, capability: int, precision: Precision, *, lean: bool) -> Config | None:
    """The measured config of a kernel on a device, None where nothing was measured."""
    if kernel in _forced:
        return _forced[kernel]
    return _table(FILE).get((kernel, capability, triton_version(), precision, lean))


def triton_version() -> str:
    """Major and minor version, as in "3.9"."""
    return ".".join(triton.__version__.split(".")[:2])


@contextmanager
def using(kernel: Kernel, config: Config) -> Iterator[None]:
    """Use a config for every launch of a kernel, to try it."""
    before = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@cache
def _table(path: Path) -> dict[Key, Config]:
    if not path.is_file():
        return {}
    return read_table(json.loads(path.read_text()))


def read_table(file: Mapping[str, Any]) -> dict[Key, Config]:
    """The configs of a file by key. Raises ValueError for an entry that is not complete."""
    found: dict[Key, Config] = {}
    for number, entry in enumerate(file["entries"]):
        try:
            key = tuple(entry[name] for name in ("kernel", "capability", "triton"))
            key += (entry["precision"], entry["lean"])
            found[key] = Config(**{name: entry[name] for name in FIELDS})  # type: ignore[index]
        except KeyError as error:
            raise ValueError(f"{FILE.name}: entry {number} has no {error}") from error
    return found
