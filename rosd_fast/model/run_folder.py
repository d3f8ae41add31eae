"""The checkpoints of a run, and the one that stands for it where a model is named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rosd_fast.errors import UserError
from rosd_fast.files import RUN_CONFIG, STATE_JSON, STEP_NAME

CHECKPOINTS = "checkpoints"  # the folder in a run folder
FORMAT = 2  # of trainer_state.json


class DamagedCheckpoint(Exception):
    """A checkpoint has a file that is missing, truncated or unreadable; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """The checkpoint of a run that is meant where the run is named as a model."""

    run: Path
    folder: Path  # a model folder
    step: int
    dev_accuracy: float | None  # in [0, 1]; None: the run had no in-domain evaluation

    def describe(self) -> str:
        """A line such as `runs/NAME: its best checkpoint, of step 40 (dev 47.3%)`."""
        if self.dev_accuracy is None:
            return f"{self.run}: its last checkpoint, of step {self.step}, as none is evaluated"
        return f"{self.run}: its best checkpoint, of step {self.step} (dev {self.dev_accuracy:.1%})"


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run and not a model."""
    has_part = (folder / RUN_CONFIG).is_file() or (folder / CHECKPOINTS).is_dir()
    return has_part and not (folder / "config.json").is_file()


def run_model(name: str | None) -> RunModel | None:
    """The checkpoint of the run folder `name`: the one with the best in-domain accuracy, else the
    last.

    None where `name` is no run folder. Raises UserError for a run without a checkpoint.
    """
    run = Path(name or "").expanduser()
    if name is None or not is_run(run):
        return None
    intact = {}
    for path in checkpoints(run):
        with suppress(DamagedCheckpoint):
            intact[path] = read_state(path)
    if not intact:
        raise UserError(
            "the run has no whole checkpoint",
            where=str(run),
            fix="Wait for its first one, or name the model that it began with",
        )
    chosen = best_checkpoint(intact) or list(intact)[-1]
    state = intact[chosen]
    return RunModel(run=run, folder=chosen, step=state["step"], dev_accuracy=state["dev_accuracy"])


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders by ascending step, intact or damaged."""
    folders = [
        path for path in (run / CHECKPOINTS).glob("step_*") if STEP_NAME.fullmatch(path.name)
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def best_checkpoint(states: Mapping[Path, dict]) -> Path | None:
    """The checkpoint with the best dev accuracy; None if none has one.

    states: trainer_state.json by checkpoint folder.
    """
    best, best_accuracy = None, -math.inf
    for path, state in states.items():
        accuracy = state["dev_accuracy"]
        if accuracy is not None and accuracy > best_accuracy:
            best, best_accuracy = path, accuracy
    return best


def read_state(path: Path) -> dict:
    """The content of trainer_state.json. Raises DamagedCheckpoint unless every file is intact."""
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
    """Raise DamagedCheckpoint unless the header parses and agrees with the file's length."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(f"{file.name} is not a valid safetensors file ({error})") from None
