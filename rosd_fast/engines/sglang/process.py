"""A managed SGLang server, which the trainer starts, watches and ends.

The server listens on the loopback interface, on a free port, with a random API key. Its output goes
to `server.log` in its folder. It runs under `watchdog.py`, so that no server outlives the trainer.
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

GRACE_S = 1.0  # for a server to exit by itself; it has nothing to save
LAST_LINES = 6  # of the log, shown in an error
READY_POLL_S = 0.25
PORT_TRIES = 3
KEY_FILE = "launch.yaml"  # readable only by the owner, unlike a command line
# Variables that torchrun sets for its ranks. A server is not one of them.
TORCHRUN_VARIABLES = re.compile(
    "TORCHELASTIC_.*|MASTER_.*|.*RANK|.*WORLD_SIZE|ROLE_NAME|OMP_NUM_THREADS"
)
CPU_ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the first grammar would take 16 s to compile
}
CPU_ARGS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--mem-fraction-static", "0.1"),
    "--sleep-on-idle",  # without it an idle server keeps a core busy
)
COMMON_ARGS = (
    "--skip-server-warmup",
    *("--grammar-backend", "llguidance"),
    "--enable-cache-report",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """How to start a server. Paths are absolute, since it runs in its own folder."""

    python: Path  # interpreter of an environment that has sglang
    model_folder: Path
    dtype: str  # a value of the option `dtype`
    on_cpu: bool
    start_timeout_s: float  # seconds until it must answer
    args: tuple[str, ...] = ()  # more arguments of sglang.launch_server; these take precedence
    gpus: tuple[int, ...] = ()  # indices of the devices it may see; (): all
    environment: tuple[tuple[str, str], ...] = ()  # more variables, with their values


class ManagedServer:
    """One server process.

    spec: how it is started.
    folder: absolute path of the folder that it runs in.
    log_path: its output, over all starts.
    endpoint: the connection to it; None while it does not run. A restart has a new port and key.
    num_starts: number of starts so far.
    """

    def __init__(self, spec: ServerSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.log_path = folder / "server.log"
        self.endpoint: Endpoint | None = None
        self.num_starts = 0
        self._log_start = 0  # offset in the log of the last start, in bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start the server and wait until it answers.

        Raises RunFailed, with the last lines of the log, when it exits or is not ready in time.
        """
        for attempt in range(PORT_TRIES):
            try:
                await self._start_once()
                return
            except RunFailed:
                port_taken = "address already in use" in self.last_lines(100).lower()
                if not port_taken or attempt + 1 == PORT_TRIES:
                    raise

    async def stop(self) -> None:
        """End the server and all its processes, if it runs."""
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
        """The end of the log of the last start, in one line."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        # Without the markers under the lines of a traceback.
        return " | ".join([line.strip() for line in lines if line.strip(" ^~")][-count:])

    async def _start_once(self) -> None:
        await self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        key, port = secrets.token_hex(24), free_port()  # hex: a leading "-" would read as an option
        self._log = self.log_path.open("ab")  # keep what earlier starts wrote
        self._log_start = self._log.tell()
        self._process = subprocess.Popen(
            self._command(key, port),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,  # a folder named `kernels` in the caller's breaks sglang
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
                    f"the SGLang server exited while starting: {self.last_lines()} "
                    f"(full log: {self.log_path})"
                )
            with contextlib.suppress(ServerError):
                await endpoint.get("/model_info", timeout_s=5.0)
                return
            if asyncio.get_running_loop().time() > deadline:
                raise RunFailed(
                    f"the SGLang server was not ready within {self.spec.start_timeout_s:g} s: "
                    f"{self.last_lines()} (full log: {self.log_path})"
                )
            await asyncio.sleep(READY_POLL_S)

    def _command(self, key: str, port: int) -> list[str]:
        spec = self.spec
        secret = self.folder / KEY_FILE
        secret.touch(mode=0o600)
        secret.write_text(json.dumps({"api-key": key}))  # JSON is valid YAML
        return [
            *(sys.executable, watchdog.__file__, str(GRACE_S)),
            *(str(spec.python), "-m", "sglang.launch_server"),
            *("--config", str(secret)),
            *("--model-path", str(spec.model_folder), "--dtype", spec.dtype),
            *("--host", "127.0.0.1", "--port", str(port)),
            *COMMON_ARGS,
            *(CPU_ARGS if spec.on_cpu else ()),
            *spec.args,
        ]

    def _environment(self) -> dict[str, str]:
        environment = {
            key: value
            for key, value in os.environ.items()
            if key != "PYTHONPATH" and not (launched() and TORCHRUN_VARIABLES.fullmatch(key))
        }
        environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder
        if self.spec.on_cpu:
            environment |= CPU_ENV
        elif self.spec.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.spec.gpus))
        return environment | dict(self.spec.environment)


def find_python(option: str | None) -> Path:
    """Return the path of the interpreter `option`, which has sglang; None: the running one.

    Raises UserError when it does not exist or has no sglang.
    """
    path = Path(sys.executable) if option is None else Path(option).expanduser().absolute()
    fix = (
        "Install the extra sglang, or set engine.python to the interpreter of an environment that "
        "has it (without a GPU: scripts/sglang_cpu_env.sh makes one)"
    )
    if shutil.which(path) is None:
        raise UserError("is not an executable", where=f"engine.python = {path}", fix=fix)
    script = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if subprocess.run([path, "-I", "-c", script], capture_output=True).returncode:
        raise UserError("sglang is not installed there", where=f"engine.python = {path}", fix=fix)
    return path


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def split_gpus(gpus: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Split devices into equal parts, one per server; empty parts if there are too few devices."""
    size = len(gpus) // count
    return [tuple(gpus[i * size : (i + 1) * size]) for i in range(count)]
