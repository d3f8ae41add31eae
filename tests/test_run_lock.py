"""One process per run folder: a second one learns who holds the lock, and a crash frees it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from rosd_fast import run_lock
from rosd_fast.errors import UserError
from rosd_fast.report.metrics import read_metrics
from rosd_fast.run_lock import LOCK_FILE, RunLock

OPTIONS = [
    *("--preset", "quickstart", "--name", "run", "--checkpoint.every", "1", "--eval.every", "0"),
    *("--sample.problems-per-step", "4", "--sample.group-size", "4"),
    *("--eval.problems", "4", "--eval.samples", "1", "--steps", "500"),
]
# Takes the lock of folder argv[1] and starts a child, to which it passes whatever is inheritable.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from rosd_fast.run_lock import RunLock

lock = RunLock()
lock.take(Path(sys.argv[1]))
command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
child = subprocess.Popen(command, stdout=2, close_fds=False)
print(child.pid, flush=True)
time.sleep(600)
"""


@contextmanager
def rosd_fast(*args: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rosd_fast", *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_refused(process: subprocess.Popen[str], holder: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    (line,) = errors.strip().splitlines()
    assert f"pid {holder.pid} on {socket.gethostname()}" in line
    assert holder.poll() is None


@pytest.mark.slow
def test_a_run_has_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with rosd_fast("train", *OPTIONS, "--out", tmp_path) as first:
        wait_for(lambda: any(run.glob("checkpoints/step_*")))
        with rosd_fast("train", "--resume", run) as second:
            assert_refused(second, first)
        with rosd_fast("report", run) as report:
            _, errors = report.communicate(timeout=120)
            assert report.returncode == 0, errors
        assert first.poll() is None
        first.kill()
        first.wait()
    with rosd_fast("train", "--resume", run) as one, rosd_fast("train", "--resume", run) as two:
        wait_for(lambda: one.poll() is not None or two.poll() is not None)
        loser, winner = (one, two) if one.poll() is not None else (two, one)
        assert_refused(loser, winner)
        begun = len(read_metrics(run / "metrics.jsonl"))
        wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) > begun)
        winner.send_signal(signal.SIGTERM)
        assert winner.wait(timeout=120) == 0
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps[-1] == steps[-2]  # its evaluation, after the checkpoint
    assert steps[:-1] == list(range(len(steps) - 1))


def test_the_lock_ends_with_its_process_even_if_a_child_survives(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(UserError, match=rf"pid {holder.pid} on {socket.gethostname()}"):
            RunLock().take(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is there
        with closing(RunLock()) as lock:
            lock.take(tmp_path)
        # leaving closes the pipe that the child reads, which ends it


def test_the_lock_is_free_after_close(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with closing(RunLock()) as lock:
            lock.take(tmp_path)
            assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()} {socket.gethostname()}\n"
            with pytest.raises(UserError):
                RunLock().take(tmp_path)
    assert not capsys.readouterr().err


ENDED = f"4194304 {socket.gethostname()}\n"  # no process has a number above the kernel's limit


@pytest.mark.parametrize("text", ["", "12", "\x00\x00", "x y z", ENDED])
def test_a_holder_that_does_not_write_its_name(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "NAMING_S", 0.1)
    with closing(RunLock()) as lock:
        lock.take(tmp_path)
        (tmp_path / LOCK_FILE).write_text(text)
        with pytest.raises(UserError, match="another process is working on this run"):
            RunLock().take(tmp_path)


@pytest.mark.parametrize("text", ["", ENDED])
def test_a_holder_that_has_not_written_its_name_yet(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that was taken from a process that was killed names that process at first."""
    monkeypatch.setattr(run_lock, "NAMING_S", 60)
    with closing(RunLock()) as lock:
        lock.take(tmp_path)
        name = (tmp_path / LOCK_FILE).read_text()
        (tmp_path / LOCK_FILE).write_text(text)
        writer = threading.Timer(0.2, (tmp_path / LOCK_FILE).write_text, [name])
        writer.start()
        with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()} on "):
            RunLock().take(tmp_path)
        writer.join()


@pytest.mark.parametrize("name", ["4194304 elsewhere\n", f"1 {socket.gethostname()}\n"])
def test_a_holder_on_another_host_or_of_another_user_is_named(name: str, tmp_path: Path) -> None:
    with closing(RunLock()) as lock:
        lock.take(tmp_path)
        (tmp_path / LOCK_FILE).write_text(name)
        with pytest.raises(UserError, match=rf"pid {name.strip().replace(' ', ' on ')}"):
            RunLock().take(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_noted(
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    for _ in range(2):
        with closing(RunLock()) as lock:
            lock.take(tmp_path)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in line and os.strerror(number) in line


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        RunLock().take(tmp_path)
