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
from rosd_fast.files import RUN_CONFIG
from rosd_fast.model.load import explain, find, short_name
from rosd_fast.model.run_folder import is_run, run_model


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
    if (found := run_model(name)) is not None:
        return _of_folder(str(found.folder), note=found.describe())
    source = find(name, weights=weights)
    if isinstance(source, Path):
        return _of_folder(name, folder=source)
    try:
        commit = extract_commit_hash(cached_file(source, "config.json"), None)
    except OSError as error:
        raise explain(error, source, "model") from error
    identity = {"name": source, "commit": commit}
    return EvaluatedModel(source=source, name=short_name(source), note="", identity=identity)


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
