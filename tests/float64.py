"""Models in float64 throughout, so that two ways of computing the same agree to 1e-10."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Asks for float64 wherever a call asks for float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        options = {key: widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(widened, args), **options)


def widened(value: Any) -> Any:
    """float64 for float32, and anything else as it is."""
    return torch.float64 if value is torch.float32 else value


@contextmanager
def float64() -> Iterator[None]:
    """Compute in float64 what models compute in float32 whatever their dtype, such as norms."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)
