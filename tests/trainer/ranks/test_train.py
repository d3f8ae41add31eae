"""`rosd-fast train` on two ranks under torchrun: the same run as on one, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launch import module_command
from tests.teacher_folder import save_teacher

ARGS = "--sample.problems-per-step 4 --sample.group-size 4 --eval.every 0 --eval.problems 8".split()


def train(ranks: int, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        module_command(ranks, "rosd_fast", "train", *args),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextmanager
def training(*args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A running job of two ranks, killed at the end if it still runs."""
    process = subprocess.Popen(
        module_command(2, "rosd_fast", "train", *args),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k.split("/")[0] in ("loss", "rollout")}
        for line in lines
    ]


def children(pid: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_same_run(one: Path, two: Path) -> None:
    expected, found = rows(one), rows(two)
    assert len(expected) == len(found)
    for own, other in zip(expected, found, strict=True):
        for row in (own, other):
            row.pop("loss/num_micro_batches", None)
            row.pop("loss/num_input_tokens", None)
            for gap in ("loss/logprob_gap_mean", "loss/logprob_gap_max"):  # rounding errors
                assert row.pop(gap, 0.0) < 1e-4
        assert other == pytest.approx(own, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_five_steps_are_the_same_on_two_ranks_and_resume_on_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        steps = ["--steps", "5", "--out", tmp_path, "--name", f"on{ranks}"]
        result = train(ranks, *ARGS, *steps)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "on1", tmp_path / "on2")
    assert "2 ranks on cpu" in result.stdout + result.stderr
    # One rank resumes what two ranks began.
    for name in ("on1", "on2"):
        result = train(1, "--resume", tmp_path / name, "--steps", "6")
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "on1", tmp_path / "on2")
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "step_000006" / "model.safetensors")
        for name in ("on1", "on2")
    )
    for name, weight in one.items():
        assert (two[name].float() - weight.float()).abs().max() < 1e-2 * weight.float().abs().max()


@pytest.mark.slow
def test_reflections_with_the_teachers_weights_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    """They are written by a full copy of the teacher, gathered from the shards of an average."""
    options = "--teacher.kind ema --reflect.weights teacher --reflect.probe-every 1".split()
    for ranks in (1, 2):
        steps = ["--steps", "3", "--out", tmp_path, "--name", f"on{ranks}"]
        result = train(ranks, *ARGS, *options, *steps)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "on1", tmp_path / "on2")


@pytest.mark.slow
def test_a_separate_teacher_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    """It also writes the reflections, with the whole model that rank 0 keeps for that."""
    teacher = save_teacher(tmp_path / "teacher", rows=16)
    options = ["--teacher.model", teacher, "--reflect.weights", "teacher"]
    for ranks in (1, 2):
        steps = ["--steps", "3", "--out", tmp_path, "--name", f"on{ranks}"]
        result = train(ranks, *ARGS, *options, *steps)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "on1", tmp_path / "on2")


def test_a_dead_rank_ends_the_job(tmp_path: Path) -> None:
    """It ends within a minute; torchrun gives the other ranks 30 s of that."""
    args = ["--steps", "500", "--out", tmp_path, "--name", "run"]
    with training(*ARGS, *args) as process:
        wait_for(lambda: (tmp_path / "run" / "rollouts" / "step_000002.jsonl").exists())
        os.kill(children(process.pid)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another rank has ended" in output
    assert "rank      : 1" in output and "SIGKILL" in output


@pytest.mark.slow
def test_sigterm_ends_it_with_a_checkpoint(tmp_path: Path) -> None:
    args = ["--steps", "500", "--out", tmp_path, "--name", "run"]
    with training(*ARGS, *args) as process:
        wait_for(lambda: (tmp_path / "run" / "rollouts" / "step_000002.jsonl").exists())
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert "stopping after this step with a checkpoint" in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = str(int(checkpoint.name[-6:]) + 1)
    result = train(2, "--resume", tmp_path / "run", "--steps", steps)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(
            ["--data.train", "nowhere.json"], "nowhere.json", id="data", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--parallel.shard-size", "3"],
            "parallel.shard_size",
            id="shards",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--parallel.head", "shard"],
            "parallel.head: shard: the model's output head is its",
            id="head",
        ),
    ],
)
def test_a_user_error_is_printed_once(tmp_path: Path, args: list[str], message: str) -> None:
    result = train(2, *args, "--out", tmp_path, "--name", "run")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert output.count("rosd-fast: error:") == 1 and message in output
    assert not (tmp_path / "run").exists()
