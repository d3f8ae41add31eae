"""The comparison of one optimizer step with TRL's."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import harness

BENCH = Path(harness.__file__).parent
sys.path.append(str(BENCH))  # where scripts find each other

from bench import step  # noqa: E402


class Work:
    """Something whose inner part is timed, too."""

    def outer(self) -> None:
        time.sleep(0.02)
        self.inner()

    def inner(self) -> None:
        time.sleep(0.04)


def test_a_stage_within_another_counts_once() -> None:
    clock, work = step.Clock(), Work()
    clock.timed(work, "outer", "loss")
    clock.timed(work, "inner", "teacher")
    start = time.perf_counter()
    work.outer()
    clock.end_step(time.perf_counter() - start)
    work.inner()
    clock.end_step(0.0)
    first, second = clock.steps
    assert first["loss"] >= 0.02
    assert first["teacher"] >= 0.04
    assert first["loss"] + first["teacher"] <= first["step"]
    assert set(second) == {"step", "teacher"}


def test_medians_are_over_the_steps_of_all_runs() -> None:
    runs = [{"steps": [{"step": 1.0, "sample": 0.5}, {"step": 9.0}]}, {"steps": [{"step": 2.0}]}]
    figures = step.summary(runs)
    assert (figures["step_s"], figures["spread"], figures["sample_s"]) == (2.0, 4.0, 0.0)


def test_busy_processes_end_with_the_block() -> None:
    with step.busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)


@pytest.mark.slow
def test_both_trainers_take_the_same_step(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    small = ["--models", "quickstart", "--problems", "2", "--length", "8", "--repeats", "1"]
    small += ["--steps", "1", "--trl-batch", "8", "--csv", str(path)]
    subprocess.run([sys.executable, str(BENCH / "step.py"), *small], check=True, cwd=tmp_path)
    rows = list(csv.DictReader(path.open()))
    assert [row["candidate"] for row in rows] == ["trl", "ours"]
    assert len({row["parameters"] for row in rows}) == 1
    for row in rows:
        assert all(float(row[f"{stage}_s"]) > 0 for stage in ("step", *step.STAGES))
        assert float(row["peak_mib"]) > float(row["used_mib"]) > 0
