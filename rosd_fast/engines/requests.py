"""Checks that every engine makes on a request before it samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.types import GenerationRequest


def completion_limit(
    request: GenerationRequest, *, vocab_size: int, context_length: int | None
) -> int:
    """Return how many tokens a completion may have: `max_new_tokens`, or what the context leaves.

    Raises UserError when the prompt leaves no room, ValueError for parameters out of range.
    """
    params, prompt = request.params, request.prompt_ids
    if not params.max_new_tokens >= 1:
        raise ValueError(f"request {request.id}: max_new_tokens is {params.max_new_tokens}")
    if not 0 <= params.temperature < math.inf:
        raise ValueError(f"request {request.id}: temperature is {params.temperature}")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"request {request.id}: top_p is {params.top_p}, must be in (0, 1]")
    if params.top_k < 0:
        raise ValueError(f"request {request.id}: top_k is {params.top_k}, must not be negative")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(f"request {request.id}: a prompt id is outside [0, {vocab_size})")
    if context_length is None:
        return params.max_new_tokens
    if len(prompt) >= context_length:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context {context_length}, "
            "which leaves no room for an answer",
            where=f"request {request.id}",
            fix="Shorten the prompt or choose a model with a longer context",
        )
    return min(params.max_new_tokens, context_length - len(prompt))


def check_ids(requests: Sequence[GenerationRequest]) -> None:
    """Raise ValueError if two requests have the same id."""
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise ValueError(
                f"two requests have the id {request.id}: they would draw the same samples"
            )
        seen.add(request.id)
