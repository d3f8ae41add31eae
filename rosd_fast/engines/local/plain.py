"""The model's plain forward pass: no cache, no padding to the left, no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch to eval mode and to inference mode; each module gets its mode back on leaving."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def plain_options(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of a forward pass that neither reads nor fills a cache."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


def plain_logits(model: PreTrainedModel, ids: Tensor, *, last: Tensor) -> Tensor:
    """The logits [B, V] of position `last` ([B] int64) of each row of `ids` [B, L].

    The tokens to the right of `last` may be any.
    """
    options = plain_options(model)
    if "logits_to_keep" in signature(model.forward).parameters:
        options["logits_to_keep"], last = last.unique(return_inverse=True)
    logits = model(input_ids=ids, **options).logits
    return logits[torch.arange(len(ids), device=ids.device), last]
