"""One module per command.

Each has `Options`, `POSITIONAL` (options that may be given without their names), `defaults` (what
`--help` shows) and `run`, which returns the exit code; `ALIASES` has other names of options, which
are not shown. None of them imports torch before `run` is called, so `--help` and mistakes are
answered at once.
"""

from __future__ import annotations

import os


def rank() -> int:
    """The rank of this process under torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
