"""A run that is killed with SIGKILL many times ends with the same bits as an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS, SEED = 12, 0
OPTIONS = [
    *("--steps", str(STEPS), "--checkpoint.every", "1"),
    *("--sample.problems-per-step", "4", "--sample.group-size", "4"),
    *("--eval.every", "4", "--eval.problems", "8", "--eval.samples", "1"),
]
CASES = {
    "rosd": (20, ["--teacher.kind", "ema", "--loss.sparsity", "entry"]),
    "grpo": (4, ["--method", "grpo", "--optim.updates-per-step", "2"]),
    "sdpo and grpo": (
        4,
        ["--method", "sdpo", "--teacher.kind", "ema", "--loss.policy-weight", "0.5"],
    ),
}
"""Number of kills and further options."""


def start(*args: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "rosd_fast", "train", *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def whole_checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.glob("step_*")) if folder.exists() else []


def content(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, except times."""
    last = run / "checkpoints" / f"step_{STEPS:06d}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [
            {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
            for row in rows
        ],
        "rollouts": {p.name: p.read_text() for p in sorted((run / "rollouts").glob("*.jsonl"))},
        "checkpoints": whole_checkpoints(run),
        "tensors": {
            f"{file.relative_to(last)}:{name}": tensor
            for file in sorted(last.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        },
    }


def assert_same(run: Path, other: Path) -> None:
    expected, found = content(other), content(run)
    assert found["metrics"] == expected["metrics"] and len(found["metrics"]) == STEPS + 1
    assert found["rollouts"] == expected["rollouts"] and len(found["rollouts"]) == STEPS
    assert found["checkpoints"] == expected["checkpoints"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


def kill_at(process: subprocess.Popen[bytes], run: Path, *, saving: bool, delay: float) -> bool:
    """Kill the run `delay` seconds after it resumes, or within a save; False: it ended before.

    A new run writes its first checkpoint before that, so that every kill is followed by a resume.
    The process that is killed goes on with the step after its last checkpoint, so it has gone on
    when the metrics file changes.
    """
    while process.poll() is None and not whole_checkpoints(run):
        time.sleep(0.0005)

    def size() -> int:
        file = run / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    before, end = size(), None
    while process.poll() is None:
        if saving and [*run.glob("checkpoints/.tmp-*")]:
            time.sleep(delay / 100)
            break
        if not saving and end is None and size() != before:
            end = time.monotonic() + delay
        if end is not None and time.monotonic() > end:
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kills_change_nothing(case: str, tmp_path: Path) -> None:
    """Half of the kills hit while a checkpoint is being written, half at any other moment."""
    num_kills, more = CASES[case]
    alone, options = tmp_path / "alone", [*OPTIONS, *more]
    finish(start(*options, "--out", tmp_path, "--name", "alone"))
    moments = random.Random(SEED)
    kills = leftovers = runs = 0
    run = tmp_path / "run0"

    def begin() -> subprocess.Popen[bytes]:
        if whole_checkpoints(run):
            return start("--resume", run)
        return start(*options, "--out", tmp_path, "--name", run.name)

    while kills < num_kills:
        process = begin()
        saving, delay = moments.random() < 0.5, moments.uniform(0, 2)
        if kill_at(process, run, saving=saving, delay=delay):
            kills += 1
            leftovers += bool([*run.glob("checkpoints/.tmp-*")])
        done = whole_checkpoints(run)
        if done and done[-1] != f"step_{STEPS:06d}":
            continue
        if done:
            assert_same(run, alone)
        runs += 1
        run = tmp_path / f"run{runs}"
    assert leftovers >= num_kills // 6  # saves that were cut off
    finish(begin())
    assert_same(run, alone)
