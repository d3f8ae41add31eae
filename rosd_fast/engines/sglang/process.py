"""An SGLang server of our own: started, watched, and gone when the trainer is.

It listens on the loopback interface, on a free port, with a key of its own. Its output goes to
`server.log` in its folder. `watchdog.py` stands between, so that no server outlives the trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rosd_fast.engines.sglang import watchdog
from rosd_fast.engines.sglang.client import Endpoint, ServerError
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.utils.distributed import launched

GRACE_S = 1.0  # what a server has to end by itself: it has nothing to save
LAST_LINES = 6  # of the log, in an error
POLL_S = 0.25
PORT_TRIES = 3
KEY_FILE = "launch.yaml"  # readable by the owner alone: a command line is everyone's to read
# What torchrun tells its ranks, of which a server is none.
OF_TORCHRUN = re.compile("TORCHELASTIC_.*|MASTER_.*|.*RANK|.*WORLD_SIZE|ROLE_NAME|OMP_NUM_THREADS")
CPU_ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the first grammar would take 16 s to compile
}
CPU_ARGS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--mem-fraction-static", "0.1"),
    "--sleep-on-idle",  # without, an idle server keeps a core busy
)
ARGS = (
    "--skip-server-warmup",
    *("--grammar-backend", "llguidance"),
    "--enable-cache-report",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """How a server is started. Paths are absolute: it runs in a folder of its own."""

    python: Path  # interpreter of an environment that has sglang
    model_folder: Path
    dtype: str
    on_cpu: bool
    start_timeout_s: float
    args: tuple[str, ...] = ()  # further ones of sglang.launch_server; they win
    gpus: tuple[int, ...] = ()  # the devices it may see; (): all


class ManagedServer:
    """One server process, which runs in `folder`, an absolute path; its log is kept there.

    `endpoint` changes with each start: a restarted server has another port.
    """

    def __init__(self, spec: ServerSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.log_path = folder / "server.log"
        self.endpoint: Endpoint | None = None
        self.num_starts = 0
        self._log_start = 0  # of the last start, in the log
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start and wait until it answers.

        Raises RunFailed, with the log's last lines, when it ends or is not ready in time.
        """
        for attempt in range(PORT_TRIES):
            try:
                await self._start_once()
                return
            except RunFailed:
                taken = "address already in use" in self.last_lines(100).lower()
                if not taken or attempt + 1 == PORT_TRIES:
                    raise

    async def stop(self) -> None:
        """End the server and all its processes; nothing happens when there is none."""
        if self.endpoint is not None:
            await self.endpoint.close()
            self.endpoint = None
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            await asyncio.to_thread(process.wait)
        if self._log is not None:
            self._log.close()
            self._log = None

    def last_lines(self, count: int = LAST_LINES) -> str:
        """The end of the last start's log, in one line."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        # Without the marks that a traceback sets under a line.
        return " | ".join([line.strip() for line in lines if line.strip(" ^~")][-count:])

    async def _start_once(self) -> None:
        await self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        key, port = secrets.token_hex(24), free_port()  # no leading "-": it becomes an option
        self._log = self.log_path.open("ab")  # what ended the last one is worth keeping
        self._log_start = self._log.tell()
        self._process = subprocess.Popen(
            self._command(key, port),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,  # not the caller's: a folder named `kernels` there breaks sglang
            env=self._environment(),
        )
        self.num_starts += 1
        self.endpoint = Endpoint(f"http://127.0.0.1:{port}", api_key=key)
        try:
            await self._wait_until_ready(self.endpoint)
        except BaseException:
            await self.stop()
            raise

    async def _wait_until_ready(self, endpoint: Endpoint) -> None:
        deadline = asyncio.get_running_loop().time() + self.spec.start_timeout_s
        while True:
            if not self.alive:
                raise RunFailed(
                    f"the SGLang server ended while it started: {self.last_lines()} "
                    f"(all of it: {self.log_path})"
                )
            with contextlib.suppress(ServerError):
                await endpoint.get("/model_info", timeout_s=5.0)
                return
            if asyncio.get_running_loop().time() > deadline:
                raise RunFailed(
                    f"the SGLang server was not ready within {self.spec.start_timeout_s:g} s: "
                    f"{self.last_lines()} (all of it: {self.log_path})"
                )
            await asyncio.sleep(POLL_S)

    def _command(self, key: str, port: int) -> list[str]:
        spec = self.spec
        secret = self.folder / KEY_FILE
        secret.touch(mode=0o600)
        secret.write_text(json.dumps({"api-key": key}))  # which is YAML, too
        return [
            *(sys.executable, watchdog.__file__, str(GRACE_S)),
            *(str(spec.python), "-m", "sglang.launch_server"),
            *("--config", str(secret)),
            *("--model-path", str(spec.model_folder), "--dtype", spec.dtype),
            *("--host", "127.0.0.1", "--port", str(port)),
            *ARGS,
            *(CPU_ARGS if spec.on_cpu else ()),
            *spec.args,
        ]

    def _environment(self) -> dict[str, str]:
        environment = {
            key: value
            for key, value in os.environ.items()
            if key != "PYTHONPATH" and not (launched() and OF_TORCHRUN.fullmatch(key))
        }
        environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder
        if self.spec.on_cpu:
            environment |= CPU_ENV
        elif self.spec.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.spec.gpus))
        return environment


def find_python(given: str | None) -> Path:
    """The interpreter that has sglang. Raises UserError unless it has.

    None: the running one.
    """
    path = Path(sys.executable) if given is None else Path(given).expanduser().absolute()
    fix = (
        "Install the extra sglang, or set engine.python to the interpreter of an environment that "
        "has it (without a GPU: scripts/sglang_cpu_env.sh makes one)"
    )
    if shutil.which(path) is None:
        raise UserError("is no program", where=f"engine.python = {path}", fix=fix)
    script = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if subprocess.run([path, "-I", "-c", script], capture_output=True).returncode:
        raise UserError("has no sglang", where=f"engine.python = {path}", fix=fix)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def split_gpus(gpus: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Equal runs of the devices, one for each server; empty where there are fewer than servers."""
    share = len(gpus) // count
    return [tuple(gpus[i * share : (i + 1) * share]) for i in range(count)]
