"""The shared parts of the benchmarks."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import harness


def test_candidates_run_in_turn() -> None:
    calls: list[str] = []

    def run(name: str) -> int:
        calls.append(name)
        return len(calls)

    timed = harness.time_alternating(
        {"a": lambda: run("a"), "b": lambda: run("b")}, repeats=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    timing, results = timed["b"]
    assert results == [4, 6, 8]  # without the warm-up
    assert len(timing.seconds) == 3
    assert min(timing.seconds) <= timing.median_s <= max(timing.seconds)
    assert harness.Timing((1.0, 4.0, 2.0)).median_s == 2.0
    assert harness.Timing((1.0, 4.0, 2.0)).spread_frac == 1.5


def test_rows_share_one_header(tmp_path: Path) -> None:
    path = tmp_path / "results" / "speed.csv"
    harness.append_row(path, {"machine": "a, b", "ratio": 2.5})
    harness.append_row(path, {"machine": "c", "ratio": 3})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"machine": "a, b", "ratio": "2.5"}, {"machine": "c", "ratio": "3"}]
    with pytest.raises(ValueError, match="other columns"):
        harness.append_row(path, {"machine": "c", "speed": 3})
    assert len(path.read_text().splitlines()) == 3


def test_a_record_replaces_the_file_and_keeps_rows_written_before_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    harness.append_row(path, {"other": "columns"})

    def measured() -> Iterator[dict[str, object]]:
        yield {"ratio": 2.5}
        yield {"ratio": 3}
        raise RuntimeError("no memory")

    recorded = harness.record(path, measured())
    first = next(recorded)
    assert first == {**harness.environment(), "ratio": 2.5}
    with pytest.raises(RuntimeError, match="no memory"):
        list(recorded)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ratio"] for row in rows] == ["2.5", "3"]
    assert rows[0]["machine"] == first["machine"]


def test_the_environment_is_recorded_without_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    row = harness.environment()
    assert row["commit"] == ""
    assert row["torch"]
    assert row["machine"]
    assert harness.version("no-such-package-at-all") == ""
