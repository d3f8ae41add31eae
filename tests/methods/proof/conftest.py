from __future__ import annotations

from tests.methods.proof.quickstart import quickstart

__all__ = ["quickstart"]
