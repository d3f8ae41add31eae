"""The files of a hub model that a server is given."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.engines.factory import model_folder
from rosd_fast.errors import UserError
from rosd_fast.model import hub_folder
from rosd_fast.model.skeleton import load_skeleton
from rosd_fast.quickstart import MODEL_DIR


def test_a_server_gets_the_cached_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what a server reads of it, and not the same weights again in another layout."""
    asked: dict[str, Any] = {}

    def download(hub_id: str, **patterns: Any) -> str:
        asked.update(patterns, hub_id=hub_id)
        return str(MODEL_DIR)

    monkeypatch.setattr(hub_folder, "snapshot_download", download)
    model = load_skeleton("quickstart", dtype="float32")
    assert model_folder("someone/model", model, tmp_path) == MODEL_DIR
    assert asked["hub_id"] == "someone/model"

    def is_taken(name: str) -> bool:
        taken, left = (
            any(fnmatch(name, pattern) for pattern in asked[key])
            for key in ("allow_patterns", "ignore_patterns")
        )
        return taken and not left

    for name in ("model-00001-of-00002.safetensors", "chat_template.jinja", "tokenizer.model"):
        assert is_taken(name)
    for name in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        assert not is_taken(name)


def test_an_unreachable_model_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(hub_folder, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"^someone/model: ") as error:
        hub_folder.hub_folder("someone/model")
    assert "\n" not in str(error.value)
