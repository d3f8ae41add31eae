"""Checkpoints: `RUN/checkpoints/step_000010/`, a model folder plus what a resume needs.

    config.json, model.safetensors, tokenizer.json, ...   Hugging Face layout
    trainer_state.safetensors     AdamW's moments, master weights, the teacher
    trainer_state.json            step, config hash, versions, the size of every file

A checkpoint is written beside its place, fsynced and renamed, so it is there whole or not at all. A
later accident with its files shows in their sizes; a damaged checkpoint is passed over, with a
warning.
"""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast import __version__
from rosd_fast.errors import UserError
from rosd_fast.folders import atomic_folder, remove_folder, remove_leftovers
from rosd_fast.learner import Learner
from rosd_fast.model.load import quiet_transformers

FORMAT = 1  # of trainer_state.json
STATE_JSON = "trainer_state.json"
STATE_TENSORS = "trainer_state.safetensors"
STEP_NAME = re.compile(r"step_(\d{6,})")

logger = logging.getLogger(__name__)


class DamagedCheckpoint(Exception):
    """Says which file is missing, cut short or unreadable."""


def save_checkpoint(
    run: Path,
    *,
    step: int,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    config_hash: str,
) -> Path:
    """Write the checkpoint of `step` into the run folder; returns its path.

    Raises UserError when the folder cannot be written or the disk is full; nothing is left of it
    then.
    """
    path = run / "checkpoints" / f"step_{step:06d}"
    try:
        with atomic_folder(path) as folder, quiet_transformers():
            save_model(learner.model, folder)
            tokenizer.save_pretrained(folder)
            tensors = {
                name: t.detach().cpu().contiguous() for name, t in learner.state_dict().items()
            }
            save_file(tensors, folder / STATE_TENSORS)
            state = {
                "format": FORMAT,
                "step": step,
                "config_hash": config_hash,
                "versions": versions(),
                "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
            }
            (folder / STATE_JSON).write_text(json.dumps(state, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"the checkpoint cannot be written ({reason})",
            where=str(path),
            fix="Free some space or choose another folder with --out",
        ) from error
    return path


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, also for generation configs that transformers refuses to save."""
    own = model.generation_config
    try:
        if own is not None:
            try:
                own.validate(strict=True)
            except ValueError:
                # Sampling parameters without do_sample: keep the token ids, which are what is
                # needed.
                model.generation_config = GenerationConfig(
                    bos_token_id=own.bos_token_id,
                    eos_token_id=own.eos_token_id,
                    pad_token_id=own.pad_token_id,
                )
        model.save_pretrained(folder)
    finally:
        model.generation_config = own


def latest_checkpoint(run: Path, *, warn: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest whole checkpoint of the run, or None; `warn` gets a line for each damaged one."""
    for path in reversed(checkpoints(run)):
        try:
            read_state(path)
        except DamagedCheckpoint as damage:
            warn(f"checkpoint {path} is passed over: {damage}")
        else:
            return path
    return None


def load_checkpoint(path: Path, learner: Learner) -> int:
    """Put a checkpoint's weights, optimizer and teacher into `learner`; returns its step.

    Raises UserError when the checkpoint is damaged or belongs to another model.
    """
    try:
        state = read_state(path)
        tensors = load_file(path / STATE_TENSORS)
        with quiet_transformers():
            saved = type(learner.model).from_pretrained(
                path, dtype=learner.model.dtype, use_safetensors=True
            )
    except (DamagedCheckpoint, OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint is damaged: {error}", where=str(path)) from error
    try:
        learner.model.load_state_dict(saved.state_dict())
        learner.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            "the checkpoint belongs to another model or other teacher options",
            where=str(path),
            fix="Resume with the model and the options that the run was started with",
        ) from error
    return state["step"]


def read_state(path: Path) -> dict:
    """The content of trainer_state.json. Raises DamagedCheckpoint unless every file is whole."""
    try:
        state = json.loads((path / STATE_JSON).read_text())
        files, step = dict(state["files"]), int(state["step"])
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{STATE_JSON} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{STATE_JSON} cannot be read") from None
    if state.get("format") != FORMAT:
        raise DamagedCheckpoint(f"its format is {state.get('format')}, this version reads {FORMAT}")
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{name} has {file.stat().st_size} bytes of {size}")
        if file.suffix == ".safetensors":
            check_tensors(file)
    return state | {"step": step}


def check_tensors(file: Path) -> None:
    """The header must parse and agree with the file's length."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(f"{file.name} is no safetensors file ({error})") from None


def prune(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what a killed process left behind."""
    for path in checkpoints(run)[:-keep_last]:
        remove_folder(path)
    remove_leftovers(run / "checkpoints")


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders by ascending step, whole or not."""
    found = [
        path for path in (run / "checkpoints").glob("step_*") if STEP_NAME.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def versions() -> dict[str, str]:
    return {
        "rosd_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
