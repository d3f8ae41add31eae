"""The model that a name stands for: a run's checkpoint, a folder, a hub model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import Config
from rosd_fast.config.load import to_toml
from rosd_fast.errors import UserError
from rosd_fast.evaluation.model import find_model
from rosd_fast.evaluation.provenance import seen_by_run
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.trainer.checkpoint import FORMAT


def make_run(folder: Path, accuracies: dict[int, float | None], **data: Any) -> Path:
    """A run folder whose checkpoints hold the quickstart's model, and are whole."""
    config = Config()
    folder.mkdir(parents=True)
    changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
    (folder / "config.toml").write_text(to_toml(changed))
    for step, accuracy in accuracies.items():
        path = folder / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(MODEL_DIR, path)
        files = {file.name: file.stat().st_size for file in path.iterdir()}
        state = {"format": FORMAT, "step": step, "dev_accuracy": accuracy, "files": files}
        (path / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_a_run_means_its_best_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "mine", {2: 0.5, 4: 0.75, 6: None})
    model = find_model(str(run))
    assert model.source == str(run / "checkpoints" / "step_000004")
    assert model.name == "mine-step_000004"
    assert model.note == f"{run}: its best checkpoint, of step 4 (dev 75.0%)"
    assert model.run == run
    named = find_model(model.source)  # the same model by its own name
    assert (named.identity, named.run, named.note) == (model.identity, run, "")


def test_a_run_without_a_dev_accuracy_means_its_last_whole_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", {2: None, 4: None, 6: None})
    (run / "checkpoints" / "step_000006" / "model.safetensors").unlink()
    model = find_model(str(run))
    assert model.note == f"{run}: its last checkpoint, of step 4, as none is evaluated"


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the run has no whole checkpoint. Wait for its first one"):
        find_model(str(make_run(tmp_path / "mine", {})))


def test_a_folder_and_a_built_in_model(tmp_path: Path) -> None:
    built_in = find_model("quickstart")
    assert (built_in.source, built_in.name, built_in.run) == ("quickstart", "quickstart", None)
    copied = shutil.copytree(MODEL_DIR, tmp_path / "copied")
    assert find_model(str(copied)).identity == built_in.identity
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_model(str(copied)).identity != built_in.identity
    with pytest.raises(UserError, match="there is no such model folder"):
        find_model(str(tmp_path / "no" / "model" / "here"))


def test_a_hub_model_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--someone--small"
    snapshot = cache / "snapshots" / commit
    shutil.copytree(MODEL_DIR, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = find_model("someone/small")
    assert model.identity == {"name": "someone/small", "commit": commit}
    assert (model.source, model.name) == ("someone/small", "small")
    with pytest.raises(UserError, match="is not a model folder, and no hub model of that name"):
        find_model("someone/missing")


def test_what_a_run_has_seen_is_said(tmp_path: Path) -> None:
    row = '{"prompt": "1?", "answer": "1", "verifier": "number"}\n'
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(row.replace("1?", f"{name}?"))
    shutil.copy(tmp_path / "dev.jsonl", tmp_path / "renamed.jsonl")
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test", "renamed")}
    run = make_run(tmp_path / "mine", {1: 0.5}, train=paths["train"], dev=paths["dev"])
    model = find_model(str(run))
    assert seen_by_run(model, paths["test"]) == []
    for source in (paths["dev"], paths["renamed"], f"{paths['dev']}@verifier=number"):
        (line,) = seen_by_run(model, source)
        assert "is the development set by which mine chooses its best checkpoint" in line
    lines = seen_by_run(model, f"{paths['train']},{paths['test']},{paths['dev']}")
    assert lines[0] == f"mine was trained on {paths['train']}" and len(lines) == 2
    held = make_run(tmp_path / "held", {1: 0.5}, train=paths["train"], dev="10%")
    (line,) = seen_by_run(find_model(str(held)), paths["train"])
    assert line.endswith("but for the 10% that it held out")
    assert seen_by_run(find_model("quickstart"), paths["dev"]) == []
