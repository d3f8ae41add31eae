"""What is checked before a run writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from rosd_fast.config import Config
from rosd_fast.data.stream import ProblemStream
from rosd_fast.inputs import with_absolute_paths, with_resolved_epochs
from rosd_fast.quickstart.tasks import load_split


def test_paths_are_the_same_from_wherever_a_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = {"python": ".venv-sglang/bin/python", "sync_folder": "weights"}
    data = {"train": "train.jsonl", "dev": "quickstart:dev"}
    found = with_absolute_paths(Config.model_validate({"engine": engine, "data": data}))
    assert found.engine.python == str(tmp_path / ".venv-sglang/bin/python")
    assert found.engine.sync_folder == str(tmp_path / "weights")
    assert found.data.train == str(tmp_path / "train.jsonl")
    assert found.data.dev == "quickstart:dev"
    engine = {"python": None, "sync_folder": "~/weights"}
    found = with_absolute_paths(Config.model_validate({"engine": engine, "data": data}))
    assert found.engine.python is None
    assert found.engine.sync_folder == str(Path.home() / "weights")


@pytest.mark.parametrize(
    ("epochs", "shuffle", "steps"), [(2, True, 6), (0.5, True, 2), (0.01, True, 1), (3, False, 10)]
)
def test_epochs_become_steps(epochs: float, shuffle: bool, steps: int) -> None:
    """Ten problems in steps of three; a shuffled pass leaves one out."""
    stream = ProblemStream(load_split("dev")[:10], batch_size=3, seed=0, shuffle=shuffle)
    found = with_resolved_epochs(Config(epochs=epochs, steps=77), stream)
    assert (found.epochs, found.steps) == (None, steps)
    assert with_resolved_epochs(Config(steps=77), stream).steps == 77
