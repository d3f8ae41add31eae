"""What a rollout engine is: token ids in, token ids and log-probabilities out.

Everything that decodes text, renders chat templates or verifies answers stands outside of it, so
the in-process engine and an HTTP server are the same to the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rosd_fast.types import Generation, GenerationRequest


class RolloutEngine(ABC):
    """Draws completions with the weights it was last given."""

    policy_version: int = 0
    shares_learner_weights: bool = (
        False  # whether it samples with the learner's own model, whatever it is given
    )
    streams: bool = False  # whether `stream` gives completions before all are done

    @abstractmethod
    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """All completions of all requests, ordered by request and then by index.

        `on_tokens(k)` is called as k further tokens were sampled, for progress displays.
        Raises UserError when a prompt does not fit the model's context.
        """

    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> AsyncIterator[list[Generation]]:
        """As `generate`, but the completions of each request as soon as it is done, in any order.

        An engine that computes all requests together gives them at the end.
        """
        generations = iter(await self.generate(requests, on_tokens=on_tokens))
        for request in requests:
            yield [next(generations) for _ in range(request.n)]

    @abstractmethod
    async def load_weights(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Sample with these weights from now on; nothing under way mixes two versions."""

    async def release_memory(self) -> None:  # noqa: B027
        """Give back device memory until the next `load_weights`, where that was asked for. Most
        engines have nothing to give."""

    def take_metrics(self) -> dict[str, float]:
        """What the engine has counted since the last call."""
        return {}

    @abstractmethod
    async def close(self) -> None:
        """Free what the engine holds."""
