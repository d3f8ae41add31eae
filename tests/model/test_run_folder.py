"""A run folder stands for one of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rosd_fast.errors import UserError
from rosd_fast.inputs import absolute_model
from rosd_fast.model.load import find
from rosd_fast.model.run_folder import FORMAT, run_model


def write_run(folder: Path, accuracies: list[float | None]) -> Path:
    """A run with a checkpoint for each in-domain accuracy, of steps 10, 20, ..."""
    for number, accuracy in enumerate(accuracies, start=1):
        checkpoint = folder / "checkpoints" / f"step_{10 * number:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        (checkpoint / "model.safetensors").touch()
        files = {"config.json": 2}
        state = {
            "format": FORMAT,
            "step": 10 * number,
            "dev_accuracy": accuracy,
            "files": files,
        }
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("accuracies", "step", "says"),
    [
        ([0.25, 0.5, 0.5, 0.375], 20, "its best checkpoint, of step 20 (dev 50.0%)"),
        ([None, None], 20, "its last checkpoint, of step 20, as none is evaluated"),
        ([0.0, None], 10, "its best checkpoint, of step 10 (dev 0.0%)"),
    ],
)
def test_the_best_checkpoint_else_the_last(
    tmp_path: Path, accuracies: list[float | None], step: int, says: str
) -> None:
    run = write_run(tmp_path / "run", accuracies)
    found = run_model(str(run))
    assert found is not None and found.describe() == f"{run}: {says}"
    folder = run / "checkpoints" / f"step_{step:06d}"
    assert find(str(run)) == found.folder == folder
    assert absolute_model(str(run)) == str(folder)


def test_a_damaged_checkpoint_is_not_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [None, None, None, 0.5])
    (run / "checkpoints" / "step_000040" / "config.json").write_text("{}{}")
    (run / "checkpoints" / "step_000030" / "trainer_state.json").unlink()
    (run / "checkpoints" / "step_000020" / "trainer_state.json").write_text("{")
    found = run_model(str(run))
    assert found is not None and found.step == 10
    (run / "checkpoints" / "step_000010" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="the run has no whole checkpoint"):
        find(str(run))


def test_a_run_that_has_just_begun_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match="the run has no whole checkpoint"):
        find(str(tmp_path))


def test_a_name_beside_runs_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/mne: there is no such run. Did you mean mine\?"):
        find("runs/mne")
    with pytest.raises(UserError, match="Runs there: mine"):
        find("runs/qwertz")
    assert find("owner/mne") == "owner/mne"


@pytest.mark.parametrize("name", ["runs/mne", "runs/mne/", "evals/mne", "./mne", "a/b/c", "/mne"])
def test_a_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such model folder"):
        find(name)


def test_a_model_folder_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.5])
    checkpoint = str(run / "checkpoints" / "step_000010")
    assert run_model(checkpoint) is None
    assert absolute_model(checkpoint) == checkpoint
    for name in (None, "quickstart", str(tmp_path), str(tmp_path / "no")):
        assert run_model(name) is None
