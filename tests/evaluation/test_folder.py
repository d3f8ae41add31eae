"""The folder of an evaluation: what a killed process leaves, and what must not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.errors import UserError
from rosd_fast.evaluation.folder import (
    COMPLETIONS,
    CompletionsLog,
    begin,
    line_of,
    read_completions,
    read_settings,
)
from rosd_fast.evaluation.records import Completion
from tests.evaluation.completions import make

SETTINGS: dict[str, Any] = {
    "identity": {"sampling": {"seed": 0, "samples": 2}, "dtype": "float32"},
    "options": {},
}
FIRST, SECOND = make("a", "4", "-5"), make("b", "", "1")


def write(folder: Path, *groups: list[Completion]) -> Path:
    log = CompletionsLog(folder, [])
    for group in groups:
        log.write(group)
    log.close()
    return folder / COMPLETIONS


def test_completions_come_back_as_they_were_written(tmp_path: Path) -> None:
    strange = make("c", "\ud800", "🙂\u2028\n", text='"\\')
    write(tmp_path, FIRST, SECOND, strange)
    assert read_completions(tmp_path, samples=2) == [*FIRST, *SECOND, *strange]
    assert len((tmp_path / COMPLETIONS).read_bytes().splitlines()) == 6
    assert read_completions(tmp_path / "nothing") == []


@given(st.integers(1, 400))
def test_a_killed_writer_costs_its_last_problem_at_most(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    file = write(folder, FIRST, SECOND)
    whole = file.read_bytes()
    file.write_bytes(whole[: max(0, len(whole) - cut)])
    found = read_completions(folder, samples=2)
    lines = len(b"".join(map(line_of, FIRST)))
    if len(whole) - cut >= lines:
        assert found in (FIRST, [*FIRST, *SECOND])
    else:
        assert found == []
    log = CompletionsLog(folder, found)  # going on
    rest = [group for group in (FIRST, SECOND) if group[0] not in found]
    for group in rest:
        log.write(group)
    log.close()
    assert file.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, FIRST, SECOND)
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], b'{"split": 3}', *lines[2:]]))
    with pytest.raises(UserError, match=r"completions.jsonl:2: is not a completion"):
        read_completions(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "evals" / "x"
    begin(folder, SETTINGS)
    begin(folder, SETTINGS)
    assert read_settings(folder) == SETTINGS
    other = json.loads(json.dumps(SETTINGS))
    other["identity"]["sampling"]["seed"] = 1
    with pytest.raises(UserError, match=r"other settings: sampling.seed was 0, is 1. Choose"):
        begin(folder, other)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already and is no evaluation"):
        begin(tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"holds no settings.json, so it is not an evaluation"):
        read_settings(tmp_path)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="holds no settings of an evaluation"):
        read_settings(tmp_path)
