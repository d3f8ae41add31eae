"""All ranks' learners as one: rank 0 orders what all do together, the others follow.

An order is the name of a method here and, for each rank, its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_fast.model.fsdp import skeleton
from rosd_fast.trainer.checkpoint import load_checkpoint
from rosd_fast.trainer.learner import Learner, StepResult
from rosd_fast.trainer.saver import Saver
from rosd_fast.utils.distributed import World, ignore_stop_signals

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rosd_fast.config import Config
    from rosd_fast.types import PackedBatch


class LearnerGroup:
    """What rank 0 sees of all learners; alone, of its own.

    model: with its initial weights, on rank 0; its skeleton elsewhere. The methods without a
    leading underscore are rank 0's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        world: World,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.world = world
        self.learner = Learner(model, config, world)
        self.saver = Saver(self.learner, tokenizer, config)
        self._is_whole = True  # no rank has failed in an order

    @classmethod
    def create(
        cls,
        model: PreTrainedModel,
        config: Config,
        world: World,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> LearnerGroup:
        """Rank 0's, and by its word the others'. tokenizer: for checkpoints."""
        if world.size > 1:
            world.broadcast((config, skeleton(model)))
        return cls(model, config, world, tokenizer)

    def step(
        self, batches: Sequence[PackedBatch], teacher_states: Sequence[Tensor] | None = None
    ) -> StepResult:
        """One optimizer step. batches: in turns, those of rank 0, of rank 1, ...

        See `Learner.step`.
        """
        size = self.world.size
        shares = [
            (batches[rank::size], None if teacher_states is None else teacher_states[rank::size])
            for rank in range(size)
        ]
        return self._call_all("step", shares)

    def weights(self) -> dict[str, Tensor]:
        """The student's weights by the state-dict names of a model without adapters."""
        self.collect()
        return self.learner.weights

    def collect(self) -> None:
        """Bring rank 0's own model up to date."""
        self._call_all("collect", [()] * self.world.size)

    def collect_teacher(self, into: PreTrainedModel) -> None:
        """Bring a whole copy of the teacher up to date."""
        others: list[tuple[Any, ...]] = [(None,)] * (self.world.size - 1)
        self._call_all("collect_teacher", [(into,), *others])

    def save(self, run: Path, step: int, dev_accuracy: float | None) -> None:
        """Begin a checkpoint. Raises UserError when the one before it could not be written."""
        self._call_all("save", [(run, step, dev_accuracy)] * self.world.size)

    def finish_save(self) -> None:
        """Wait for rank 0's part of the checkpoint that is being written. Raises its UserError."""
        self.saver.wait()

    def load(self, path: Path) -> int:
        """Go on from a checkpoint; returns its step. Raises UserError."""
        return self._call_all("load", [(path,)] * self.world.size)

    def close(self) -> None:
        """Finish the checkpoint that is being written, and let the others end."""
        try:
            self.saver.wait()
        finally:
            if self._is_whole:
                with suppress(RuntimeError):  # they have gone
                    self.world.shutdown_workers()

    def _call_all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        return self._execute(self.world.scatter([(method, own) for own in arguments]))

    def _execute(self, order: tuple[str, tuple[Any, ...]]) -> Any:
        method, arguments = order
        self._is_whole = False
        result = ORDERS[method](self, *arguments)
        self._is_whole = True
        return result


ORDERS = {
    "step": lambda learners, *own: learners.learner.step(*own),
    "collect": lambda learners: learners.learner.collect(),
    "collect_teacher": lambda learners, into: learners.learner.teacher.collect(into),
    "save": lambda learners, *own: learners.saver.save(*own),
    "load": lambda learners, path: load_checkpoint(path, learners.learner),
}


def run_worker(world: World) -> None:
    """What the ranks beside rank 0 do: wait for its word, and act on it, until it ends."""
    ignore_stop_signals()
    begun = world.scatter(None)
    if begun is None:
        return
    config, model = begun
    learners = LearnerGroup(model, config, world, tokenizer=None)
    while (order := world.scatter(None)) is not None:
        learners._execute(order)
    learners.saver.wait()
