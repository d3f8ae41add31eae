"""The model that an evaluation is of: a run's checkpoint, a model folder, a hub id or a server's.

runs/NAME                        its best whole checkpoint by dev accuracy, else its last
runs/NAME/checkpoints/step_10    that checkpoint
a model folder, a hub id, quickstart, smollm2
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from rosd_fast.config import Config
from rosd_fast.config.load import apply_toml
from rosd_fast.errors import UserError
from rosd_fast.evaluation.settings import model_hash
from rosd_fast.model.load import explain, find, short_name
from rosd_fast.trainer.checkpoint import (
    DamagedCheckpoint,
    best_checkpoint,
    checkpoints,
    read_state,
)

RUN_CONFIG = "config.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate.

    source: what loads it, as the option `model`.
    name: fit for a folder name.
    note: how it was found, in one line; empty: it is what was named.
    identity: what tells it from other models: a hash of its files, or the commit of a hub model.
    run: the run folder that it is a checkpoint of; None: it is none.
    """

    source: str
    name: str
    note: str
    identity: dict[str, Any]
    run: Path | None = None

    @property
    def run_config(self) -> Config | None:
        """The options of its run; None: it is no checkpoint, or they cannot be read any more."""
        if self.run is None:
            return None
        try:
            return apply_toml(Config(), self.run / RUN_CONFIG, accept_old_names=True)
        except UserError:
            return None


def find_model(name: str, *, weights: bool = True) -> EvaluatedModel:
    """The model that `name` stands for. Raises UserError when there is no such model.

    weights: whether it must have weights, and not only a tokenizer.
    """
    folder = Path(name).expanduser()
    if is_run(folder):
        checkpoint, why = choose_checkpoint(folder)
        return _of_folder(str(checkpoint), note=f"{name}: {why}, {checkpoint.name}")
    source = find(name, weights=weights)
    if isinstance(source, Path):
        return _of_folder(name, folder=source)
    try:
        commit = extract_commit_hash(cached_file(source, "config.json"), None)
    except OSError as error:
        raise explain(error, source, "model") from error
    identity = {"name": source, "commit": commit}
    return EvaluatedModel(source=source, name=short_name(source), note="", identity=identity)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run and not a model."""
    return (folder / RUN_CONFIG).is_file() and not (folder / "config.json").is_file()


def choose_checkpoint(run: Path) -> tuple[Path, str]:
    """(the checkpoint of a run to evaluate, why it): the best by dev accuracy, else the last.

    Damaged ones do not count. Raises UserError when none is left.
    """
    intact = {}
    for path in checkpoints(run):
        try:
            intact[path] = read_state(path)
        except DamagedCheckpoint:
            continue
    if not intact:
        raise UserError(
            "the run has no whole checkpoint",
            where=str(run),
            fix="Wait for its first one, or name the model that it began with",
        )
    best = best_checkpoint(intact)
    if best is None:
        return list(intact)[-1], "its last checkpoint, as none has a dev accuracy"
    accuracy = intact[best]["dev_accuracy"]
    return best, f"its best checkpoint by dev accuracy ({accuracy:.1%})"


def _of_folder(name: str, *, folder: Path | None = None, note: str = "") -> EvaluatedModel:
    folder = find(name) if folder is None else folder  # type: ignore[assignment]
    assert isinstance(folder, Path)
    folder = folder.absolute()
    run = folder.parent.parent
    run = run if folder.parent.name == "checkpoints" and is_run(run) else None
    own = short_name(str(folder)) if Path(name).expanduser().is_dir() else short_name(name)
    return EvaluatedModel(
        source=str(folder) if Path(name).expanduser().is_dir() else name,
        name=f"{run.name}-{own}" if run else own,
        note=note,
        identity={"sha256": model_hash(folder)},
        run=run,
    )
