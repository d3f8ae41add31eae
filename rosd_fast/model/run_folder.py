"""A run folder in place of a model folder: the checkpoint that it stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rosd_fast.errors import UserError
from rosd_fast.files import STATE_JSON, STEP_NAME

CHECKPOINTS = "checkpoints"  # the folder in a run folder


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
            return f"{self.run}: its last checkpoint, of step {self.step}"
        return f"{self.run}: its best checkpoint, of step {self.step} (dev {self.dev_accuracy:.1%})"


def run_model(name: str | None) -> RunModel | None:
    """The checkpoint of the run folder `name`: the one with the best in-domain accuracy, else the
    last.

    None where `name` is no run folder. Raises UserError for a run without a checkpoint.
    """
    run = Path(name or "").expanduser()
    if name is None or not (run / CHECKPOINTS).is_dir() or (run / "config.json").is_file():
        return None
    states = {path: state for path in checkpoints(run) if (state := _state(path)) is not None}
    if not states:
        raise UserError("the run has no whole checkpoint", where=str(run), fix="Name a model")
    chosen = best_checkpoint(states) or list(states)[-1]
    state = states[chosen]
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


def _state(checkpoint: Path) -> dict | None:
    """The step and the accuracy of a checkpoint; None: they cannot be read."""
    try:
        state = json.loads((checkpoint / STATE_JSON).read_text())
        return {"step": int(state["step"]), "dev_accuracy": state["dev_accuracy"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
