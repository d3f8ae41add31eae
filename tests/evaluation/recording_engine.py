"""An engine that gives the completions of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rosd_fast.engines.base import RolloutEngine
from rosd_fast.types import Generation, GenerationRequest


class RecordingEngine(RolloutEngine):
    """Gives the completions of a table, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, answers: Mapping[str, Sequence[str]]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.requests: list[GenerationRequest] = []

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        self.requests += requests
        made = []
        for request in requests:
            for index in range(request.n):
                text = self.answers[request.id][index]
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                cut = len(ids) >= request.params.max_new_tokens
                ids = (
                    ids[: request.params.max_new_tokens]
                    if cut
                    else (*ids, self.tokenizer.eos_token_id)
                )
                made.append(
                    Generation(
                        request_id=request.id,
                        index=index,
                        completion_ids=ids,
                        logprobs=(0.0,) * len(ids),
                        finish_reason="length" if cut else "stop",
                        policy_version=5,
                    )
                )
                if on_tokens is not None:
                    on_tokens(len(ids))
        return made

    async def load_weights(self, weights: Mapping[str, Any], *, version: int) -> None:
        self.policy_version = version

    async def close(self) -> None:
        self.requests = []
