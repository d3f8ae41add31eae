"""What a rollout engine is: token ids in, token ids and log-probabilities out.

Everything that decodes text, renders chat templates or verifies answers stands outside of it, so
the in-process engine and an HTTP server are the same to the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rosd_fast.types import Generation, GenerationRequest


class RolloutEngine(ABC):
    """Draws completions with the weights it was last given."""

    policy_version: int = 0

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

    @abstractmethod
    async def load_weights(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Sample with these weights from now on; nothing under way mixes two versions."""

    @abstractmethod
    async def close(self) -> None:
        """Free what the engine holds."""
