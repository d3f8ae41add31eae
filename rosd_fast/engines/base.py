"""The interface of a rollout engine: token ids in, token ids and log-probabilities out.

Decoding text, rendering chat templates and verifying answers happen outside of the engine, so the
training loop treats the in-process engine and an HTTP server the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rosd_fast.model.weight_stream import WeightStream
    from rosd_fast.types import Generation, GenerationRequest


class RolloutEngine(ABC):
    """Samples completions with the weights that it was last given.

    policy_version: version of these weights.
    shares_learner_weights: whether it samples with the learner's own model, so that `load_weights`
        needs no weights.
    streams: whether requests may be added while others are computed, at no cost to both.
    """

    policy_version: int = 0
    shares_learner_weights: bool = False
    streams: bool = False

    @abstractmethod
    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Return all completions of all requests, ordered by request and then by index.

        `on_tokens(k)` is called whenever k more tokens were sampled, for progress displays.
        Raises UserError when a prompt does not fit the model's context.
        """

    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> AsyncIterator[list[Generation]]:
        """Like `generate`, but yield each request's completions as soon as it is done, in any
        order.

        An engine that computes all requests together yields them at the end.
        """
        generations = iter(await self.generate(requests, on_tokens=on_tokens))
        for request in requests:
            yield [next(generations) for _ in range(request.n)]

    @abstractmethod
    async def load_weights(
        self, weights: Mapping[str, Tensor] | WeightStream, *, version: int
    ) -> None:
        """Sample with these weights from now on. No in-flight completion mixes two versions.

        weights: in memory, or bucket by bucket. They must not change until this returns.
        """

    async def release_memory(self) -> None:  # noqa: B027
        """Release device memory until the next `load_weights`, if the engine is configured to.

        Most engines have nothing to release.
        """

    def take_metrics(self) -> dict[str, float]:
        """Return what the engine has counted since the last call."""
        return {}

    @abstractmethod
    async def close(self) -> None:
        """Free what the engine holds."""
