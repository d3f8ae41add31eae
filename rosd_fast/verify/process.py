"""A worker process as the trainer sees it: its pipes, and how it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rosd_fast.verify.protocol import MAX_LINE, Limits

THREADS = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")
MAX_ERRORS = 1 << 16  # bytes of a worker's standard error that are read


@dataclass(slots=True, eq=False)
class Worker:
    """A process and what it has loaded.

    spare: whether it only works while all others hang.
    loaded: names of the verifiers that it was told to import.
    batch: number of tasks that it gets at once.
    hangs: whether its task takes long.
    """

    process: asyncio.subprocess.Process
    spare: bool
    loaded: set[str] = field(default_factory=set)
    batch: int = 1
    hangs: bool = False

    async def read(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None when the process has ended, or says what is no message.

        Raises TimeoutError.
        """
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                message = json.loads(await self.process.stdout.readline())
        except ValueError:  # the end, half a line, a line that is too long, not JSON
            return None
        return message if isinstance(message, dict) else None

    def write(self, lines: Sequence[bytes]) -> None:
        """Send lines. What the process does not read waits in memory, as it may hang."""
        assert self.process.stdin is not None
        self.process.stdin.writelines(lines)

    @property
    def ended(self) -> bool:
        assert self.process.stdout is not None
        return self.process.returncode is not None or self.process.stdout.at_eof()

    async def kill(self) -> int:
        """End the process and its children; return its exit status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return await self.process.wait()

    async def errors(self) -> str:
        """The last line that a process wrote to standard error before it had started."""
        assert self.process.stderr is not None
        text = (await self.process.stderr.read(MAX_ERRORS)).decode(errors="replace")
        lines = [line for line in text.split("\n") if line.strip()]
        return lines[-1] if lines else "it says nothing"


async def start_worker(limits: Limits, *, spare: bool) -> Worker:
    """Start a process in a process group of its own, which finds the modules that this one finds.

    It does not begin as a copy of this process, which may use a GPU and has many threads.
    """
    path = [str(Path(entry).absolute()) for entry in sys.path]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "rosd_fast.verify.worker", json.dumps(asdict(limits))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_LINE,
        start_new_session=True,
        env={
            **os.environ,
            **{f"{name}_NUM_THREADS": "1" for name in THREADS},
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONHASHSEED": "0",  # a verifier that goes through a set is the same in each worker
        },
    )
    return Worker(process, spare)
