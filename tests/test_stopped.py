"""The last checkpoint is completed even if a signal arrives while it is being written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rosd_fast.report.metrics import read_metrics
from rosd_fast.trainer.checkpoint import latest_checkpoint

# Runs first in the child. It holds the saver at its first fsync until the file `go` is there, and
# tells by files that the saver is held, and that the main thread waits for it.
SITECUSTOMIZE = """
import os, pathlib, threading, time

folder = pathlib.Path(__file__).parent
fsync, join = os.fsync, threading.Thread.join

def held_fsync(descriptor):
    if threading.current_thread().name == "checkpoint":
        (folder / "saving").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
    fsync(descriptor)

def told_join(thread, timeout=None):
    if thread.name == "checkpoint":
        (folder / "waiting").touch()
    join(thread, timeout)

os.fsync, threading.Thread.join = held_fsync, told_join
"""
OPTIONS = [
    *("--preset", "quickstart", "--name", "run", "--checkpoint.every", "0", "--eval.every", "0"),
    *("--sample.problems-per-step", "4", "--sample.group-size", "4"),
    *("--eval.problems", "4", "--eval.samples", "1"),
]


@contextmanager
def training(folder: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    """A run in folder/run whose saver is paused; files in `folder` say when."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    options = [*OPTIONS, "--steps", str(steps), "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rosd_fast", "train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to the line with `text`, or all output if there is none."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    return "".join(lines)


@pytest.mark.parametrize(
    ("number", "stopping"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM at the last step"),
        pytest.param(signal.SIGTERM, True, id="second SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, id="second Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_the_last_checkpoint_is_finished(tmp_path: Path, number: int, stopping: bool) -> None:
    run = tmp_path / "run"
    with training(tmp_path, steps=200 if stopping else 1) as process:
        if stopping:
            wait_for(lambda: (run / "rollouts" / "step_000001.jsonl").exists(), process)
            process.send_signal(number)
        wait_for(lambda: all((tmp_path / name).exists() for name in ("saving", "waiting")), process)
        assert latest_checkpoint(run) is None
        output = ""
        for _ in range(2):
            process.send_signal(number)
            output += read_until(process, "is being written")
        (tmp_path / "go").touch()
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output + rest
    step = int(read_metrics(run / "metrics.jsonl")[-1]["step"])
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None and checkpoint.name == f"step_{step:06d}"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [checkpoint.name]
    assert ("rosd-fast train --resume" in rest) == stopping
