"""What hangs is ended, what was killed goes on, and what is done is not repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from day_one import runner, stage
from day_one.registry import Entry
from day_one.results import Item, Result, load, path_of
from day_one.runner import run_stage
from day_one.stage import Phase, Plan

ENTRY = Entry(name="machine", title="A stage", weight=1)
IDENTITY = {"source": "abc"}
COUNT_RUNS = """
import json, sys
for line in sys.stdin:
    key = json.loads(line)["key"]
    with open(sys.argv[1], "a") as file:
        file.write(key + "\\n")
    print(json.dumps({"rows": [{"key": key}]}), flush=True)
"""
# Writes one result, starts a child, and never ends.
HANGS = """
import os, subprocess, sys, time
from pathlib import Path
from day_one.results import Item, Result
result = Result(stage="machine", identity={"source": "abc"}, items={"a": Item(rows=[{"x": 1}])})
result.save(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
(Path(sys.argv[1]) / "pid").write_text(str(child.pid))
time.sleep(1000)
"""


class Three(stage.Stage):
    name = "machine"

    def phases(self, plan: Plan) -> Iterator[Phase]:
        yield Phase(items={"a": {}, "b": {}})
        assert "a" in plan.results  # a later phase reads what the ones before have found
        yield Phase(items={"c": {}})

    def summary(self, plan: Plan) -> list[dict[str, object]]:
        return [{"table": "Sum", "items": len(plan.results)}]


def start(out: Path, command: list[str], *, seconds: float = 30.0, identity=IDENTITY) -> Result:
    path = os.pathsep.join(p for p in sys.path if p)
    return run_stage(
        ENTRY,
        out=out,
        device="cpu",
        seconds=seconds,
        identity=identity,
        environment={**os.environ, "PYTHONPATH": path},
        command=command,
    )


def run_here(out: Path, *, seconds: float = 60.0, identity=IDENTITY) -> Result:
    """Run `Three` in this process; `out`/runs has a line for every item that a worker had."""
    plan = Plan(device="cpu", out=out, seconds=seconds)
    command = [sys.executable, "-c", COUNT_RUNS, str(out / "runs")]
    return stage.run(Three(), plan, identity, command)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_item_is_recorded_and_the_stage_is_done(tmp_path: Path) -> None:
    result = run_here(tmp_path)
    assert result.state == "done" and result.is_good
    assert list(result.items) == ["a", "b", "c"]
    assert result.summary == [{"table": "Sum", "items": 3}]
    assert load(tmp_path, "machine") == result


def test_what_hangs_is_ended_with_all_it_started_and_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.0)
    monkeypatch.setattr(runner, "LEAST_S", 0.0)
    result = start(tmp_path, [sys.executable, "-c", HANGS, str(tmp_path)], seconds=12.0)
    assert result.state == "ended"
    assert result.items["a"].rows == [{"x": 1}]
    assert load(tmp_path, "machine") == result
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_stage_that_fails_says_why(tmp_path: Path) -> None:
    result = start(tmp_path, [sys.executable, "-c", "raise SystemExit('no such luck')"])
    assert result.state == "failed"
    assert result.error == "exit status 1: no such luck"
    assert not result.is_good


def test_killed_half_way_it_keeps_what_was_done_and_repeats_the_rest(tmp_path: Path) -> None:
    killed = Result(stage="machine", identity=dict(IDENTITY), items={"a": Item(rows=[{"x": 1}])})
    killed.items["b"] = Item(error="the process died (-9)")
    killed.save(tmp_path)  # its state is "running"
    result = run_here(tmp_path)
    assert result.state == "done"
    assert result.items["a"].rows == [{"x": 1}]
    assert (tmp_path / "runs").read_text().split() == ["b", "c"]


def test_a_stage_killed_by_signal_9_goes_on(tmp_path: Path) -> None:
    """The real process of a real stage, killed at its first result."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "day_one.stage", "tools", "--out", str(tmp_path)]
    command += ["--device", "cpu", "--seconds", "60", "--identity", '{"source": "abc"}']
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    path, deadline = path_of(tmp_path, "tools"), time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = load(tmp_path, "tools")
    assert before is not None and before.state == "running"
    subprocess.run(command, env=environment, check=True, timeout=120)
    after = load(tmp_path, "tools")
    assert after is not None and after.state == "done" and len(after.items) == 5


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    run_here(tmp_path)
    result = start(tmp_path, [sys.executable, "-c", "raise SystemExit('repeated')"])
    assert result.state == "done"


def test_another_source_or_device_measures_again(tmp_path: Path) -> None:
    run_here(tmp_path)
    run_here(tmp_path, identity={"source": "other"})
    assert (tmp_path / "runs").read_text().split() == ["a", "b", "c"] * 2
    run_here(tmp_path, identity={"source": "other", "commit": "of another page"})
    assert (tmp_path / "runs").read_text().split() == ["a", "b", "c"] * 2


def test_without_time_a_stage_is_skipped_and_old_results_stay(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ""]
    assert start(tmp_path, command, seconds=1.0).state == "skipped"
    run_here(tmp_path)
    half = load(tmp_path, "machine")
    assert half is not None
    half.state = "cut"
    half.save(tmp_path)
    result = start(tmp_path, command, seconds=1.0)
    assert result.state == "cut" and len(result.items) == 3


def test_a_stage_without_time_for_its_items_is_cut(tmp_path: Path) -> None:
    class Slow(Three):
        def phases(self, plan: Plan) -> Iterator[Phase]:
            yield Phase(items={"a": {}})

    plan = Plan(device="cpu", out=tmp_path, seconds=0.0)
    result = stage.run(Slow(), plan, IDENTITY, [sys.executable, "-c", COUNT_RUNS, "x"])
    assert result.state == "cut" and result.left == ["a"]


def test_a_phase_may_end_before_the_stage(tmp_path: Path) -> None:
    class Early(Three):
        def phases(self, plan: Plan) -> Iterator[Phase]:
            yield Phase(items={"a": {}}, until=0.0)
            yield Phase(items={"b": {}})

    plan = Plan(device="cpu", out=tmp_path, seconds=60)
    result = stage.run(Early(), plan, IDENTITY, [sys.executable, "-c", COUNT_RUNS, "/dev/null"])
    assert (result.state, result.left, list(result.items)) == ("cut", ["a"], ["b"])


def test_a_damaged_file_counts_as_no_results(tmp_path: Path) -> None:
    path = path_of(tmp_path, "machine")
    path.parent.mkdir()
    path.write_text('{"stage": "machine"')
    assert load(tmp_path, "machine") is None
    assert run_here(tmp_path).state == "done"
