"""One stage as a process group with a time limit; whatever happens, its file says what it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from day_one.crew import last_lines
from day_one.registry import Entry
from day_one.results import Result, State, load

GRACE_S = 5.0  # beyond a stage's own limit, before it is killed
LEAST_S = 8.0  # less is not worth the imports


def run_stage(
    entry: Entry,
    *,
    out: Path,
    device: str,
    seconds: float,
    identity: Mapping[str, str],
    environment: Mapping[str, str],
    command: Sequence[str] | None = None,
) -> Result:
    """Run a stage, unless its results are complete; returns them.

    seconds: its time limit; the process group is killed soon after it. command: of the process,
    by default that of `day_one.stage`.
    """
    found = load(out, entry.name)
    if found is not None and found.holds_for(identity) and found.is_complete:
        return found
    if seconds < LEAST_S:
        return ended(entry, out, identity, state="skipped", seconds=0.0, error="")
    if command is None:
        command = [sys.executable, "-m", "day_one.stage", entry.name]
        command += ["--out", str(out), "--device", device, "--seconds", f"{seconds:.1f}"]
        command += ["--identity", json.dumps(dict(identity))]
    log = out / "work" / "logs" / f"{entry.name}.stage.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        process.wait(seconds + GRACE_S)
        in_time = True
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        kill_group(process)
    found = load(out, entry.name)
    if found is not None and found.state in ("done", "cut") and process.returncode == 0:
        return found
    return ended(
        entry,
        out,
        identity,
        state="failed" if in_time else "ended",
        seconds=time.monotonic() - start,
        error=": ".join([f"exit status {process.returncode}", *last_lines(log)]) if in_time else "",
    )


def ended(
    entry: Entry,
    out: Path,
    identity: Mapping[str, str],
    *,
    state: State,
    seconds: float,
    error: str,
) -> Result:
    """The results of a stage that did not come to its end, with what it had found."""
    found = load(out, entry.name)
    if found is None or not found.holds_for(identity):
        found = Result(stage=entry.name, identity=dict(identity))
    elif state == "skipped":
        return found  # what an earlier run found, as it was
    found.state, found.seconds, found.error = state, round(seconds, 1), error
    found.save(out)
    return found


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
