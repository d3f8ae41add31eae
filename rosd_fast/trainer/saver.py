"""Writes a run's checkpoints in a thread, so that training continues meanwhile."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

from transformers import PreTrainedTokenizerBase

from rosd_fast.config import Config
from rosd_fast.config.load import config_hash
from rosd_fast.trainer.checkpoint import (
    load_checkpoint,
    prune,
    rate_checkpoint,
    write_checkpoint,
)
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.snapshot import Snapshot


class Saver:
    """Writes and loads checkpoints, one at a time. Each rank has a saver.

    learner: this rank's learner.
    tokenizer: for the exported model on rank 0; None elsewhere.
    options: the options of `[checkpoint]`.
    """

    def __init__(
        self, learner: Learner, tokenizer: PreTrainedTokenizerBase | None, config: Config
    ) -> None:
        self.learner = learner
        self.tokenizer = tokenizer
        self.options = config.checkpoint
        self._hash = config_hash(config)
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._unrated: list[tuple[Path, int, float]] = []

    def save(self, run: Path, step: int, dev_accuracy: float | None) -> None:
        """Copy the state and start writing it. A collective.

        Raises the error of the previous checkpoint, if it has not been raised yet.
        """
        self.wait()
        snapshot = Snapshot.of(
            self.learner,
            self.tokenizer,
            step=step,
            config_hash=self._hash,
            dev_accuracy=dev_accuracy,
        )
        self._thread = Thread(target=self._write, args=(run, snapshot), name="checkpoint")
        self._thread.start()
        if not self.options.asynchronous:
            self.wait()

    def load(self, path: Path) -> int:
        """Load a checkpoint into the learner; returns its step. A collective. Raises UserError."""
        return load_checkpoint(path, self.learner)

    def rate(self, run: Path, step: int, dev_accuracy: float | None) -> None:
        """Give the checkpoint of `step`, if there is one, the accuracy that was measured after it
        was saved: at the latest before the next checkpoint, which may then replace it. On rank 0.

        dev_accuracy: None: it was not measured.
        """
        if dev_accuracy is not None:
            self._unrated.append((run, step, dev_accuracy))
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is written, and rated. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        while self._unrated:
            rate_checkpoint(*self._unrated.pop(0))

    def _write(self, run: Path, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(run, snapshot, self.learner.world)
            if self.learner.world.is_rank0:
                prune(run, self.options.keep_last, keep_best=self.options.keep_best)
        except BaseException as error:
            self._error = error
