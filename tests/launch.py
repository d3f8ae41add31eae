"""Starting ranks in tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def module_command(ranks: int, module: str, *args: object) -> Sequence[str]:
    """`python -m module args`, for several ranks under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [sys.executable, "-m", *(launcher if ranks > 1 else []), module, *map(str, args)]
