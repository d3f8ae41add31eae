from __future__ import annotations

from tests.model_fixtures import distill_samples, make_model

__all__ = ["distill_samples", "make_model"]
