"""Checkpoints: `RUN/checkpoints/step_000010/`, a model folder plus what a resume needs.

    config.json, model.safetensors, tokenizer.json, ...   Hugging Face layout, adapters merged
    adapter/                with LoRA: the adapters by themselves, in peft's layout
    state/*.safetensors     trained weights in full precision, AdamW's moments, averages: one file
                            per rank, readable by any number of ranks
    trainer_state.json      step, config hash, versions, number of threads, dev accuracy, the size
                            of every file

A checkpoint is written to a temporary folder, fsynced and renamed: it is complete or absent. Later
damage is detected by file sizes. A damaged checkpoint is skipped with a warning, and the next save
renames it to `damaged_step_000010/`. Weights that are not trained, and those of a frozen teacher,
are not saved: they come from the models that the run began with, and a fingerprint of each detects
that another one is given.

`state/` is written by torch.distributed.checkpoint (DCP),
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import json
import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rosd_fast import __version__
from rosd_fast.errors import UserError
from rosd_fast.files import (
    STATE_JSON,
    atomic_folder,
    remove_folder,
    remove_leftovers,
    write_atomic,
)
from rosd_fast.model.run_folder import (
    FORMAT,
    DamagedCheckpoint,
    best_checkpoint,
    checkpoints,
    read_state,
)
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.snapshot import Snapshot
from rosd_fast.utils.distributed import SINGLE_PROCESS, World

STATE_FOLDER = "state"
DAMAGED = "damaged_"  # prefix of the name of a damaged checkpoint

logger = logging.getLogger(__name__)


def write_checkpoint(run: Path, snapshot: Snapshot, world: World = SINGLE_PROCESS) -> Path:
    """Write a checkpoint into the run folder; returns its path.

    A collective of `world.checkpoint_group`, whose ranks all see the run folder. Raises UserError
    if the checkpoint cannot be written or the disk is full; then nothing is left of it, and earlier
    checkpoints stay.
    """
    path = checkpoint_folder(run, snapshot.step)
    try:
        with shared_folder(path, world) as folder:
            if folder is None:  # rank 0 could not create it, and raises the reason
                return path
            (folder / STATE_FOLDER).mkdir(exist_ok=True)
            write_state(snapshot.state, folder / STATE_FOLDER, world)
            snapshot.save_export(folder)
            if snapshot.export is None:
                return path
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            about = {
                "format": FORMAT,
                "step": snapshot.step,
                "config_hash": snapshot.config_hash,
                "fingerprint": snapshot.fingerprint,
                "teacher_fingerprint": snapshot.teacher_fingerprint,
                "dev_accuracy": snapshot.dev_accuracy,
                "ranks": world.size,
                "threads": snapshot.threads,
                "versions": versions(),
                "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
            }
            (folder / STATE_JSON).write_text(json.dumps(about, indent=2) + "\n")
    except (OSError, SafetensorError, CheckpointException) as error:
        raise UserError(
            f"the checkpoint cannot be written ({reason(error)})",
            where=str(path),
            fix="Free some space or choose another folder with --out",
        ) from error
    return path


def rate_checkpoint(run: Path, step: int, dev_accuracy: float) -> None:
    """Write the dev accuracy into the checkpoint of a step; without a checkpoint do nothing.

    Raises UserError if it cannot be written; then the checkpoint stays as it was.
    """
    path = checkpoint_folder(run, step)
    try:
        about = read_state(path)
        if about["dev_accuracy"] != dev_accuracy:
            about["dev_accuracy"] = dev_accuracy
            write_atomic(path / STATE_JSON, (json.dumps(about, indent=2) + "\n").encode())
    except DamagedCheckpoint:  # the next `prune` warns of it
        return
    except OSError as error:
        raise UserError(
            f"the checkpoint cannot be written ({reason(error)})",
            where=str(path),
            fix="Free some space or choose another folder with --out",
        ) from error


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / "checkpoints" / f"step_{step:06d}"


@contextmanager
def shared_folder(path: Path, world: World) -> Iterator[Path | None]:
    """Yield the `atomic_folder` that rank 0 creates, on all ranks.

    If rank 0 cannot create it, it raises, and the other ranks get None.
    """
    if not world.is_rank0:
        yield world.broadcast(None, group=world.checkpoint_group)
        return
    told = False
    try:
        with atomic_folder(path) as folder:
            world.broadcast(folder, group=world.checkpoint_group)
            told = True
            yield folder
    finally:
        if not told:
            world.broadcast(None, group=world.checkpoint_group)


def write_state(state: dict[str, Any], folder: Path, world: World) -> None:
    """Write each rank's part to its own file. A collective of `world.checkpoint_group`."""
    with quiet_dcp():
        save(
            state,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=world.checkpoint_group,
            no_dist=world.size == 1,
        )


def read_into(state: dict[str, Tensor], folder: Path, world: World) -> None:
    """Fill the tensors of `state` from files that any number of ranks wrote. A collective.

    Raises KeyError or RuntimeError if names or shapes differ.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, tensor in state.items():
        if saved[name].size != tensor.shape:
            raise RuntimeError(f"{name} has another shape")
    with quiet_dcp():
        load(
            state,
            storage_reader=reader,
            process_group=world.checkpoint_group,
            no_dist=world.size == 1,
        )


@contextmanager
def quiet_dcp() -> Iterator[None]:
    """Silence DCP's warning that torch.distributed is not used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def reason(error: BaseException) -> str:
    """The error in words; for an error on several ranks, that of the first."""
    if isinstance(error, CheckpointException):
        failed, _ = next(iter(error.failures.values()))
        return reason(failed)
    return getattr(error, "strerror", None) or str(error)


def latest_checkpoint(run: Path, *, warn: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest intact checkpoint of the run, or None; `warn` gets a line per damaged one."""
    for path in reversed(checkpoints(run)):
        try:
            read_state(path)
        except DamagedCheckpoint as damage:
            warn(f"checkpoint {path} is skipped: {damage}")
        else:
            return path
    return None


def load_checkpoint(path: Path, learner: Learner) -> int:
    """Load a checkpoint into `learner`, which has the initial weights; returns its step.

    A collective, on any number of ranks. Raises UserError if the checkpoint is damaged or belongs
    to another model.
    """
    try:
        about = read_state(path)
    except DamagedCheckpoint as error:
        raise UserError(f"the checkpoint is damaged: {error}", where=str(path)) from error
    if learner.full_model is not None and about["fingerprint"] != learner.fingerprint:
        raise UserError(
            "the checkpoint belongs to another model than the one that `model` names, whose "
            "weights the run began with",
            where=str(path),
            fix="Put that model back in its place",
        )
    before = about.get("teacher_fingerprint", "")
    if learner.full_model is not None and before != learner.teacher_fingerprint:
        raise UserError(
            "the checkpoint was made with another teacher than the model that `teacher.model` "
            "names now",
            where=str(path),
            fix="Put that model back in its place",
        )
    state = learner.state_dict(portable=learner.world.size != about["ranks"])
    try:
        read_into(state, path / STATE_FOLDER, learner.world)
        learner.load_state_dict(state)
    except (KeyError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise UserError(
            "the checkpoint belongs to another model or other teacher options",
            where=str(path),
            fix="Resume with the model and the options that the run was started with",
        ) from error
    if learner.keeps_full_model:
        learner.gather_weights()
    return about["step"]


def prune(
    run: Path,
    keep_last: int,
    *,
    keep_best: bool = False,
    warn: Callable[[str], None] = logger.warning,
) -> None:
    """Delete all but the newest `keep_last` intact checkpoints, and temporary folders of a killed
    process.

    Damaged checkpoints do not count; each is renamed, and `warn` gets a line for it.

    keep_best: also keep the checkpoint with the best dev accuracy, the earliest of equals.
    """
    intact: dict[Path, dict] = {}
    for path in checkpoints(run):
        try:
            intact[path] = read_state(path)
        except DamagedCheckpoint as damage:
            warn(f"checkpoint {path} is damaged ({damage}); it is kept as {move_aside(path).name}")
    kept = set(list(intact)[-keep_last:])
    if keep_best and (best := best_checkpoint(intact)) is not None:
        kept.add(best)
    for path in intact:
        if path not in kept:
            remove_folder(path)
    remove_leftovers(run / "checkpoints")


def move_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is not listed any more; returns the new path.

    It replaces an older damaged checkpoint of the same step.
    """
    aside = path.with_name(f"{DAMAGED}{path.name}")
    remove_folder(aside)
    return path.rename(aside)


def versions() -> dict[str, str]:
    """The versions of what a checkpoint depends on."""
    return {
        "rosd_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
