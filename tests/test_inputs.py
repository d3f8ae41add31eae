"""What is checked before a run writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from rosd_fast.config import Config
from rosd_fast.inputs import with_absolute_paths


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
