"""The folder of an evaluation: what a killed process leaves, and what must not change."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
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
from rosd_fast.evaluation.settings import FORMAT
from rosd_fast.run_lock import RunLock
from tests.evaluation.completions import make

SETTINGS: dict[str, Any] = {
    "format": FORMAT,
    "model": {"name": "m"},
    "identity": {
        "model": {},
        "data": {},
        "sampling": {"seed": 0, "samples": 2, "temperature": 1.0},
        "chat": {},
        "dtype": "float32",
        "engine": "local",
    },
    "options": {},
}
FIRST, SECOND = make("a", "4", "-5"), make("b", "", "1")


def begun(folder: Path, settings: dict[str, Any] = SETTINGS) -> None:
    with closing(RunLock()) as lock:
        begin(folder, settings, lock)


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
    begun(folder)
    begun(folder)
    assert read_settings(folder) == SETTINGS
    other = json.loads(json.dumps(SETTINGS))
    other["identity"]["sampling"]["seed"] = 1
    with pytest.raises(UserError, match=r"other settings: sampling.seed was 0, is 1. Choose"):
        begun(folder, other)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already and is no evaluation"):
        begun(tmp_path)
    with pytest.raises(UserError, match=r"holds no settings.json, so it is not an evaluation"):
        read_settings(tmp_path)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="holds no settings of an evaluation"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        {"format": FORMAT + 1},
        {"options": None},
        {"model": None},
        {"identity": SETTINGS["identity"] | {"sampling": {}}},
        {"identity": {}},
    ],
)
def test_settings_without_a_part_are_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | broken))
    with pytest.raises(UserError, match="holds no settings of an evaluation"):
        read_settings(tmp_path)


def test_a_folder_that_was_only_locked_is_begun(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    (tmp_path / ".settings.json.17.tmp").write_text("{")  # killed while it wrote them
    begun(tmp_path)
    assert read_settings(tmp_path) == SETTINGS


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    with closing(RunLock()) as first:
        begin(tmp_path / "x", SETTINGS, first)
        with pytest.raises(UserError, match="is working on this evaluation"):
            begun(tmp_path / "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score", "high"),
        ("score", float("nan")),
        ("score", 1.5),
        ("success", None),
        ("index", True),
        ("finish_reason", "tired"),
        ("unknown", 1),
    ],
)
def test_a_line_with_a_wrong_field_is_named(tmp_path: Path, field: str, value: object) -> None:
    file = write(tmp_path, FIRST, SECOND)
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {field: value}), *rest, ""]))
    with pytest.raises(UserError, match=rf"completions.jsonl:1: is not a completion .*{field}"):
        read_completions(tmp_path)


def test_a_problem_with_one_completion_twice_is_not_complete(tmp_path: Path) -> None:
    twice = [FIRST[0], FIRST[0]]
    write(tmp_path, twice, SECOND)
    assert read_completions(tmp_path, samples=2) == SECOND


FULL_DISK = """
import resource, sys
from pathlib import Path
from rosd_fast.errors import UserError
from rosd_fast.evaluation.folder import CompletionsLog
from tests.evaluation.completions import make
log = CompletionsLog(Path(sys.argv[1]), [])
log.write(make("a", "4", "-5"))
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
try:
    log.write(make("b", "4", "-5"))
except UserError as error:
    print(error)
log.close()
"""


def test_a_full_disk_is_one_line_and_costs_the_last_problem(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert "the evaluation's folder cannot be written (File too large)" in done.stdout
    assert (tmp_path / COMPLETIONS).stat().st_size == 700  # in the middle of a line
    assert read_completions(tmp_path, samples=2) == make("a", "4", "-5")
