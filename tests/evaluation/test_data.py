"""The data sets of an evaluation: their names, and problems that the model has no room for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rosd_fast.config import Config, DataConfig, SourceConfig, VerifyConfig
from rosd_fast.data.sources import parse_sources
from rosd_fast.errors import UserError
from rosd_fast.evaluation.data import distinct_names, fitting_data_sets, load_data_sets


def write(path: Path, *words: int) -> str:
    """Problems whose prompts have so many words."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": "sum " * n, "answer": "1", "verifier": "number"} for n in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sources_of_one_name_get_their_folders(tmp_path: Path) -> None:
    names = ("chemistry/test", "material/test", "x/chemistry/test", "material/hard")
    paths = []
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.jsonl").touch()
        paths.append(str(tmp_path / f"{name}.jsonl"))
    text = ",".join([*paths, "quickstart:test", "quickstart:dev"])
    assert distinct_names(list(parse_sources(text))) == [
        "chemistry-test",
        "material-test",
        "chemistry-test-2",
        "hard",
        "test",
        "dev",
    ]


def test_problems_without_room_are_refused_or_left_out(tmp_path: Path) -> None:
    source = ",".join(write(tmp_path / name / "test.jsonl", 5, 2000, 6) for name in "ab")
    found, _ = load_data_sets(SourceConfig(source=source), VerifyConfig())
    config = Config(model="quickstart")
    with pytest.raises(UserError, match=r"context has 1024, .* data\.bad_rows=skip"):
        fitting_data_sets(found, config)
    skip = config.model_copy(update={"data": DataConfig(bad_rows="skip")})
    left, notes = fitting_data_sets(found, skip)
    assert {name: len(problems) for name, problems in left.items()} == {"a-test": 2, "b-test": 2}
    assert len(notes) == 2 and notes[1].startswith("b-test: left out 1 of 3 problems. problem b:2:")
