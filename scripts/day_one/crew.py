"""Items in worker processes: one that crashes, or hangs, costs one item and nothing else.

A fault on a GPU leaves a process's context unusable and a kernel may never end, so that a worker is
replaced after either. Workers live in the process group of the stage and die with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from day_one.results import Item

LAST_LINES = 3  # of a crashed worker's output
START_S = 60.0  # for a worker to import what it needs, on top of an item's own limit


class Worker:
    """A process that answers one item after the other, each with a line of JSON."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def ask(self, key: str, args: Mapping[str, Any], limit_s: float, left_s: float) -> Item:
        """The item's result; after an error the next item gets a new process.

        limit_s: the item's own time limit; left_s: the stage's, which a start does not extend.
        """
        start = time.monotonic()
        fresh = self.process is None
        answer: dict[str, Any]
        try:
            process = self.process or self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps({"key": key, "args": dict(args)}).encode() + b"\n")
            process.stdin.flush()
            answer = self._read(min(limit_s + (START_S if fresh else 0), left_s))
        except (OSError, TimeoutError, ValueError) as error:
            answer = {"error": self._explain(error)}
        if answer.get("error"):
            self.stop()
        return Item(
            rows=answer.get("rows", []),
            error=answer.get("error", ""),
            seconds=round(time.monotonic() - start, 2),
        )

    def stop(self) -> None:
        """End the process and what it started."""
        if self.process is not None:
            for pid in [self.process.pid, *descendants(self.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
        self.process, self.buffer = None, b""

    def _start(self) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        return self.process

    def _read(self, limit_s: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        end = time.monotonic() + limit_s
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            wait = end - time.monotonic()
            if wait <= 0 or not select.select([descriptor], [], [], wait)[0]:
                raise TimeoutError(f"no answer within {limit_s:.0f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                code = self.process.wait()
                raise OSError(f"the process died ({code})")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def _explain(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return str(error)
        return ": ".join([str(error), *last_lines(self.log)])


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and that those have started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # grows
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def last_lines(log: Path) -> list[str]:
    """The end of a log as one text, in a list; empty where there is nothing."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    kept = [line for line in lines if line][-LAST_LINES:]
    return [" | ".join(kept)[-500:]] if kept else []


def run_items(
    items: Mapping[str, Mapping[str, Any]],
    done: Callable[[str, Item], None],
    *,
    command: Sequence[str],
    log: Path,
    workers: int,
    item_s: float,
    end: float,
) -> list[str]:
    """Run items on `workers` processes until `end` of time.monotonic(); returns the keys left.

    done: called with each result, one at a time. item_s: an item's time limit.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for key in items:
        waiting.put(key)
    lock, tried = threading.Lock(), set()

    def work() -> None:
        worker = Worker(command, log)
        try:
            while (left := end - time.monotonic()) > 0:
                try:
                    key = waiting.get_nowait()
                except queue.Empty:
                    return
                item = worker.ask(key, items[key], item_s, left)
                if time.monotonic() >= end and item.error:
                    return  # its time was cut, not its own limit: it was not tried
                with lock:
                    tried.add(key)
                    done(key, item)
        finally:
            worker.stop()

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(max(1, min(workers, len(items))))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [key for key in items if key not in tried]


def worker_command(stage: str, device: str) -> list[str]:
    return [sys.executable, "-m", "day_one.worker", stage, device]
