"""Single-controller view of the per-rank learners.

Rank 0 sends (method name, arguments) to each rank and calls the method itself; the other ranks run
`run_worker`, which calls the methods that rank 0 names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from rosd_fast.model.adapter_files import adapter_weights
from rosd_fast.model.fsdp import skeleton
from rosd_fast.model.weight_stream import WeightStream, WholeWeights
from rosd_fast.trainer.learner import Learner, StepResult, TeacherSource
from rosd_fast.trainer.saver import Saver
from rosd_fast.trainer.shards import Gather, ShardedWeights
from rosd_fast.utils.distributed import World, ignore_stop_signals

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rosd_fast.config import Config
    from rosd_fast.types import PackedBatch

# The collectives that rank 0 may ask for, as OWNER.METHOD.
METHODS = frozenset(
    {
        "learner.step",
        "learner.gather_weights",
        "learner.release_weights",
        "learner.gather_teacher",
        "learner.gather_parameters",
        "learner.hold_shards",
        "learner.token_logprobs",
        "saver.save",
        "saver.load",
    }
)


class LearnerGroup:
    """The learners of all ranks, as rank 0 sees them. Every rank has one; only rank 0 calls it.

    world: this process among the ranks.
    learner: this rank's learner.
    saver: this rank's part in checkpoints.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        world: World,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        teacher: TeacherSource = "initial",
    ) -> None:
        self.world = world
        self.learner = Learner(model, config, world, teacher=teacher)
        self.saver = Saver(self.learner, tokenizer, config)
        self._lock = Lock()  # weights may be gathered in another thread than the learner's
        self._in_call = False  # a call has begun and not returned: the workers may be in it, too
        self._num_held = 0

    @classmethod
    def create(
        cls,
        model: PreTrainedModel,
        config: Config,
        world: World,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        teacher: TeacherSource = "initial",
    ) -> LearnerGroup:
        """Create the group on rank 0 and send config and model skeleton to the workers.

        model: with its initial weights. tokenizer: for the checkpoints. teacher: as for `Learner`.
        """
        if world.size > 1:
            is_model = isinstance(teacher, PreTrainedModel)
            world.broadcast((config, skeleton(model), skeleton(teacher) if is_model else teacher))
        return cls(model, config, world, tokenizer, teacher=teacher)

    def step(
        self, batches: Sequence[PackedBatch], teacher_states: Sequence[Tensor] | None = None
    ) -> StepResult:
        """Run one optimizer step; see `Learner.step`.

        batches: dealt to the ranks in turns, rank 0 first.
        """
        size = self.world.size
        arguments = [
            (batches[rank::size], None if teacher_states is None else teacher_states[rank::size])
            for rank in range(size)
        ]
        return self._call_all("learner.step", arguments)

    def weights(self) -> dict[str, Tensor]:
        """The student's weights without adapters, in the layout of the model's files."""
        self.gather_weights()
        return self.learner.file_weights

    def stream(self) -> WeightStream:
        """The student's current weights without adapters, in the layout of the model's files.

        Read it before the next step, or take `held()` of it.
        """
        if self.world.size == 1:
            return WholeWeights(self.learner.file_weights)
        assert self.learner.frame is not None
        return ShardedWeights(
            self.learner.frame,
            self._gather,
            on_gpu=self.learner.policy.device.type == "cuda",
            hold=self._hold,
        )

    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapters' current weights, by the names of peft's files."""
        if self.world.size == 1:
            assert self.learner.full_model is not None
            return adapter_weights(self.learner.full_model)
        frame = self.learner.frame
        assert frame is not None
        return frame.adapter_weights(self._gather(frame.adapters))

    def token_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The student's log-probabilities of `ids[1:]` at temperature 1."""
        return self._call_all("learner.token_logprobs", [(ids,)] * self.world.size)

    def gather_weights(self) -> None:
        """Update rank 0's full model to the student's current weights."""
        self._call_all("learner.gather_weights", [()] * self.world.size)

    def release_weights(self) -> None:
        """Free the memory of rank 0's full model where only servers and checkpoints need it."""
        self._call_all("learner.release_weights", [()] * self.world.size)

    def gather_teacher(self, into: PreTrainedModel) -> None:
        """Write the teacher's current weights into `into`, a full copy on rank 0."""
        workers: list[tuple[Any, ...]] = [(None,)] * (self.world.size - 1)
        self._call_all("learner.gather_teacher", [(into,), *workers])

    def save(self, run: Path, step: int, dev_accuracy: float | None) -> None:
        """Start writing a checkpoint. Raises UserError if the previous one could not be written."""
        self._call_all("saver.save", [(run, step, dev_accuracy)] * self.world.size)

    def rate(self, run: Path, step: int, dev_accuracy: float | None) -> None:
        """Give the checkpoint of `step`, if there is one, the dev accuracy; see `Saver.rate`."""
        self.saver.rate(run, step, dev_accuracy)

    def finish_save(self) -> None:
        """Wait for rank 0's part of the checkpoint that is being written. Raises its UserError."""
        self.saver.wait()

    def load(self, path: Path) -> int:
        """Resume from a checkpoint; returns its step. Raises UserError."""
        return self._call_all("saver.load", [(path,)] * self.world.size)

    def close(self) -> None:
        """Finish the checkpoint that is being written and shut the workers down."""
        try:
            self.saver.wait()
        finally:
            if not self._in_call:
                with suppress(RuntimeError):  # the workers have exited already
                    self.world.shutdown_workers()

    def _call_all(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        """Call a method on every rank, each with its own arguments; returns rank 0's result."""
        with self._lock:
            self._in_call = True
            if self.world.size > 1:
                self.world.scatter([None, *((name, args) for args in arguments[1:])])
            result = self.method(name)(*arguments[0])
            self._in_call = False
            return result

    def _gather(self, names: Sequence[str], number: int | None = None) -> dict[str, Tensor]:
        arguments = [(tuple(names), number)] * self.world.size
        return self._call_all("learner.gather_parameters", arguments)

    def _hold(self) -> Gather:
        """Copy all ranks' shards; returns what gathers from the copies."""
        self._num_held += 1
        number = self._num_held
        self._call_all("learner.hold_shards", [(number,)] * self.world.size)
        return lambda names: self._gather(names, number)

    def method(self, name: str) -> Callable[..., Any]:
        """This rank's method of that name. Raises ValueError if it is not in `METHODS`."""
        if name not in METHODS:
            raise ValueError(f"{name} is not a method that all ranks run")
        owner, _, method = name.partition(".")
        return getattr(getattr(self, owner), method)


def run_worker(world: World) -> None:
    """Serve rank 0 on another rank: call the methods that it names until it shuts the workers down.

    Returns at once if rank 0 fails before it has created a `LearnerGroup`.
    """
    ignore_stop_signals()
    received = world.scatter(None)
    if received is None:
        return
    config, model, teacher = received
    group = LearnerGroup(model, config, world, tokenizer=None, teacher=teacher)
    while (call := world.scatter(None)) is not None:
        name, arguments = call
        group.method(name)(*arguments)
    group.saver.wait()
