"""The trainer's side of `states_hook`: its installation, and what a server's record stands for.

For servers that are started by hand:

    python -m rosd_fast.engines.sglang.states_plugin FOLDER
    PYTHONPATH=FOLDER python -m sglang.launch_server ...

Without it a server sends its states as lists of numbers, some 20 bytes per value.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosd_fast.engines.sglang import states_hook

MODULE = "rosd_states"
ENTRY_POINTS = f"[sglang.srt.plugins]\n{MODULE} = {MODULE}:register\n"
METADATA = f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 1.0\n"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IN_MEMORY = Path("/dev/shm")
PREFIX = "rosd-states"


def write_plugin(folder: Path) -> Path:
    """Write the hook and its entry point to a folder; returns it. For PYTHONPATH."""
    about = folder / f"{MODULE}-1.0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(states_hook.__file__, folder / f"{MODULE}.py")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (about / "METADATA").write_text(METADATA)
    return folder


def make_states_folder(fallback: Path) -> Path:
    """A new folder in memory for the states of one run's servers, readable by its user only.

    Those of trainers that were killed are removed. fallback: where it is made on a system without
    such a place.
    """
    parent = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else fallback
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{PREFIX}-*"):
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", old.name)
        if found and not is_running(int(found[1])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-", dir=parent))


def is_running(pid: int) -> bool:
    """Whether there is a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def unpacked(record: Mapping[str, Any], folder: Path | None) -> tuple[int, Tensor]:
    """The first position and the [n, H] float32 states of a record; its file is removed.

    folder: of the files. Raises KeyError, TypeError, ValueError or OSError for a record that is
    not whole.
    """
    if "file" in record:
        if folder is None:
            raise ValueError("a server of another trainer writes states to files")
        path = folder / Path(record["file"]).name
        data = path.read_bytes()
        path.unlink()
    else:
        data = base64.b64decode(record["data"])
    rows, width = record["shape"]
    if not data:
        return record["first"], torch.empty(rows, width)
    values = torch.frombuffer(bytearray(data), dtype=DTYPES[record["dtype"]])
    return record["first"], values.view(rows, width).float()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {__spec__.name} FOLDER")
    print(f"PYTHONPATH={write_plugin(Path(sys.argv[1]).absolute())}")
