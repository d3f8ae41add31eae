"""Rollouts are written in a thread, whole or not at all, and failures are told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.errors import UserError
from rosd_fast.report import read_rollouts, rollout_writer, rollouts_path, write_rollouts
from rosd_fast.report.rollout_writer import RolloutWriter


@pytest.fixture
def step(make_group: Any) -> dict[str, Any]:
    group, verdicts = make_group(["2 + 2 = 5", "4"], [0.0, 1.0])
    return {
        "step": 1,
        "groups": [group],
        "verdicts": verdicts,
        "reflections": {},
        "spans": {},
        "per_token": {},
    }


def test_a_step_is_written_while_the_caller_goes_on(
    tmp_path: Path, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(path: Path, **options: Any) -> Path:
        begun.set()
        assert may_go_on.wait(60)
        return write_rollouts(path, **options)

    monkeypatch.setattr(rollout_writer, "write_rollouts", slow)
    writer, path = RolloutWriter(), rollouts_path(tmp_path, 1)
    writer.write(path, **step)
    assert begun.wait(60) and not path.exists()
    may_go_on.set()
    writer.write(rollouts_path(tmp_path, 2), **step)  # waits for the first one
    assert len(read_rollouts(path)) == 2
    writer.wait()
    assert rollouts_path(tmp_path, 2).read_bytes() == path.read_bytes()
    writer.wait()  # nothing is left to wait for


def test_a_full_disk_is_one_line(
    tmp_path: Path, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, path = RolloutWriter(), tmp_path / "rollouts" / "step_000001.jsonl"

    def full(path: Path, **options: Any) -> Path:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(rollout_writer, "write_rollouts", full)
        writer.write(path, **step)
        with pytest.raises(UserError, match=r"step_000001.jsonl: the rollouts cannot .*No space"):
            writer.wait()
    writer.wait()  # an error is raised once
    writer.write(path, **step)
    writer.wait()
    assert len(read_rollouts(path)) == 2


def test_other_failures_are_raised_at_the_next_step(tmp_path: Path, step: dict[str, Any]) -> None:
    writer = RolloutWriter()
    writer.write(tmp_path / "a.jsonl", **(step | {"verdicts": {}}))
    with pytest.raises(KeyError):
        writer.write(tmp_path / "b.jsonl", **step)
    assert [*tmp_path.iterdir()] == []
