"""What is checked before a run writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from rosd_fast.config import Config
from rosd_fast.config.load import apply_toml, to_toml
from rosd_fast.data.stream import ProblemStream
from rosd_fast.inputs import load_inputs, with_absolute_paths, with_resolved_epochs
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


def test_every_path_in_a_list_of_sources_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train": "a.jsonl@weight=2,quickstart:train", "dev": "10%", "dev_ood": "owner/name"}
    data["verifier"] = "mine.py:score"
    found = with_absolute_paths(Config.model_validate({"data": data})).data
    assert found.train == f"{tmp_path}/a.jsonl@weight=2,quickstart:train"
    assert (found.dev, found.dev_ood) == ("10%", "owner/name")
    assert found.verifier == f"{tmp_path}/mine.py:score"


@pytest.mark.parametrize(
    ("epochs", "shuffle", "steps"), [(2, True, 6), (0.5, True, 2), (0.01, True, 1), (3, False, 10)]
)
def test_epochs_become_steps(epochs: float, shuffle: bool, steps: int) -> None:
    """Ten problems in steps of three; a shuffled pass leaves one out."""
    stream = ProblemStream(load_split("dev")[:10], batch_size=3, seed=0, shuffle=shuffle)
    found = with_resolved_epochs(Config(epochs=epochs, steps=77), stream)
    assert (found.epochs, found.steps) == (None, steps)
    assert with_resolved_epochs(Config(steps=77), stream).steps == 77


def test_a_resumed_run_has_the_same_split(tmp_path: Path) -> None:
    given = {"train": "quickstart:train", "dev": "10%", "split_seed": 3}
    config = Config.model_validate({"data": given, "eval": {"problems": 20}, "seed": 1})
    inputs = load_inputs(config, weights=False)
    assert inputs.config.data.dev == "10%"
    assert len(inputs.dev_splits["dev"]) == 20
    assert any("10% held out" in note for note in inputs.data_notes)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(inputs.config))
    again = load_inputs(
        apply_toml(Config(), path, accept_old_names=True).model_copy(update={"seed": 2}),
        weights=False,
    )
    assert [p.id for p in again.problems] == [p.id for p in inputs.problems]
    assert list(again.dev_splits["dev"]) == list(inputs.dev_splits["dev"])
    held = {p.id for p in inputs.dev_splits["dev"]}
    assert not held & {p.id for p in inputs.problems}
