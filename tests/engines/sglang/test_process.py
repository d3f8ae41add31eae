"""Managed servers: started, watched, restarted, and never left behind.

The server is a small HTTP program in place of SGLang; everything around it is real.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.engines.sglang import watchdog
from rosd_fast.engines.sglang.client import Endpoint, Refused, ServerError
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import (
    ManagedServer,
    ServerSpec,
    find_python,
    free_port,
    split_gpus,
)
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train

SERVER = """
import http.server, json, os, subprocess, sys, time
arguments = sys.argv[1:]
print("arguments", arguments, flush=True)
words = "RANK", "WORLD", "ELASTIC", "OMP_NUM_THREADS"
names = [k for k in os.environ if any(word in k for word in words)]
print("ranks", names, flush=True)
print("environment", os.environ.get("CUDA_VISIBLE_DEVICES"), os.getcwd(), flush=True)
if "--broken" in arguments:
    sys.exit("no such model\\nsorry")
if "--slow" in arguments:
    time.sleep(60)
key = json.load(open(arguments[arguments.index("--config") + 1]))["api-key"]
command = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, start_new_session=True)
print("pids", os.getpid(), child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers["Authorization"] == "Bearer " + key
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(b'{"weight_version": "default"}')

port = int(arguments[arguments.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Checks that its path arguments are valid in its own folder.
SGLANG = """
import asyncio, json, sys
from pathlib import Path

if "-I" in sys.argv:  # asked whether it has sglang
    sys.exit(0)
sys.path.insert(0, {root!r})
from aiohttp import web
from tests.engines.sglang.fake_sglang import FakeSglang

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

class Server(FakeSglang):
    async def _load(self, request):
        folder = Path((await request.json())["model_path"])
        if not (folder / "model.safetensors").is_file():
            return web.json_response({{"success": False, "message": f"no {{folder}}"}}, status=400)
        return await super()._load(request)

async def main():
    async with Server(port=int(value("--port"))):
        await asyncio.Event().wait()

json.load(open(value("--config")))
assert Path(value("--model-path"), "config.json").is_file()
asyncio.run(main())
"""


@pytest.fixture
def spec(tmp_path: Path) -> ServerSpec:
    """A server whose interpreter runs `SERVER`, whatever module it is told to run."""
    return ServerSpec(
        python=make_python(tmp_path, SERVER),
        model_folder=tmp_path / "model",
        dtype="float32",
        on_cpu=True,
        start_timeout_s=30,
    )


def make_python(folder: Path, program: str) -> Path:
    """An interpreter that runs `program`, whatever it is told to run."""
    (folder / "server.py").write_text(program)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "server.py"} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def logged_pids(server: ManagedServer) -> list[int]:
    """The ids of the server's process and of its child, from the last start."""
    lines = server.log_path.read_text().splitlines()
    return [int(pid) for pid in [line for line in lines if line.startswith("pids")][-1].split()[1:]]


def assert_ended(pids: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while any(map(exists, pids)):
        assert time.monotonic() < deadline, f"still running: {[p for p in pids if exists(p)]}"
        time.sleep(0.05)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_start_and_stop(spec: ServerSpec, tmp_path: Path) -> None:
    async def run() -> list[int]:
        server = ManagedServer(spec, tmp_path / "server")
        await server.start()
        assert server.alive and server.endpoint is not None
        assert await server.endpoint.get("/model_info", timeout_s=5) == {
            "weight_version": "default"
        }
        pids = logged_pids(server)
        assert all(map(exists, pids))
        await server.stop()
        assert not server.alive and server.endpoint is None
        await server.stop()  # has no effect
        return pids

    assert_ended(asyncio.run(run()), within_s=0.5)
    log = (tmp_path / "server" / "server.log").read_text()
    assert "'--host', '127.0.0.1'" in log and "'--grammar-backend', 'llguidance'" in log
    assert str(tmp_path / "server") in log.split("environment")[1]  # where it was started


def test_a_server_is_not_a_rank_of_torchrun(
    spec: ServerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_PORT TORCHELASTIC_RUN_ID OMP_NUM_THREADS".split()
    for name in names:
        monkeypatch.setenv(name, "2")
    server = ManagedServer(spec, tmp_path / "server")

    async def run() -> None:
        await server.start()
        await server.stop()

    asyncio.run(run())
    assert "ranks []" in (tmp_path / "server" / "server.log").read_text()


def test_the_key_is_not_readable_by_others(spec: ServerSpec, tmp_path: Path) -> None:
    """Neither from the command line nor from a file, and the server requires it."""

    async def run() -> None:
        server = ManagedServer(spec, tmp_path / "server")
        await server.start()
        assert server.endpoint is not None
        try:
            secret = tmp_path / "server" / "launch.yaml"
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
            key = secret.read_text().split('"')[3]
            command = Path(f"/proc/{logged_pids(server)[0]}/cmdline").read_text()
            assert len(key) > 20 and key not in command
            keyless = Endpoint(server.endpoint.url)
            with pytest.raises(Refused, match="401"):
                await keyless.get("/model_info", timeout_s=5)
            await keyless.close()
        finally:
            await server.stop()

    asyncio.run(run())


def test_a_server_that_does_not_start_gives_the_reason(spec: ServerSpec, tmp_path: Path) -> None:
    broken = ManagedServer(with_args(spec, "--broken"), tmp_path / "server")
    with pytest.raises(RunFailed, match=r"exited while starting: .*no such model \| sorry .*log"):
        asyncio.run(broken.start())
    slow = ManagedServer(with_args(spec, "--slow", start_timeout_s=1.0), tmp_path / "slow")
    with pytest.raises(RunFailed, match="not ready within 1 s"):
        asyncio.run(slow.start())
    assert not slow.alive


def with_args(spec: ServerSpec, *args: str, start_timeout_s: float = 30.0) -> ServerSpec:
    return replace(spec, args=args, start_timeout_s=start_timeout_s)


def test_a_dead_server_is_restarted(spec: ServerSpec, tmp_path: Path) -> None:
    async def run() -> None:
        server = ManagedServer(spec, tmp_path / "server")
        handle = ServerHandle(server, name="server0", health_every_s=30, health_timeout_s=5)
        try:
            assert await handle.ensure_up() and not await handle.ensure_up()
            first = logged_pids(server)
            os.kill(first[0], signal.SIGKILL)
            assert_ended(first[:1])
            with pytest.raises(ServerError):
                await handle.post("/generate", {}, timeout_s=5)
            handle.mark_suspect()
            assert await handle.ensure_up()
            assert handle.tag is None and handle.num_starts == 2
            assert_ended(first)
            assert all(map(exists, logged_pids(server)))
        finally:
            await handle.close()

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_the_trainer(spec: ServerSpec, tmp_path: Path, number: int) -> None:
    """Whatever ends the trainer: here signals that it does not handle."""
    script = f"""
        import asyncio, time
        from pathlib import Path
        from rosd_fast.engines.sglang.process import ManagedServer, ServerSpec
        spec = ServerSpec(python=Path({str(spec.python)!r}), model_folder=Path("/model"),
                          dtype="float32", on_cpu=True, start_timeout_s=30)
        async def main():
            server = ManagedServer(spec, Path({str(tmp_path / "server")!r}))
            await server.start()
            print("started", flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "started\n"
    pids = logged_pids(ManagedServer(spec, tmp_path / "server"))
    assert all(map(exists, pids))
    trainer.send_signal(number)
    trainer.wait()
    trainer.stdout.close()
    assert_ended(pids)


def test_watchdog_passes_the_exit_status_on() -> None:
    command = [sys.executable, watchdog.__file__, "1", sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait() == 7
    missing = subprocess.run([*command[:3], "/no/such/program"], capture_output=True, text=True)
    assert missing.returncode == 127 and "/no/such/program" in missing.stderr


def test_an_interpreter_without_sglang_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.python = /no/such/python: is not an executable"):
        find_python("/no/such/python")
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    with pytest.raises(
        UserError, match=r"sglang is not installed there\. .*scripts/sglang_cpu_env\.sh"
    ):
        find_python(str(empty))


def test_a_run_with_managed_servers_takes_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default --out and an interpreter beside it, although servers run in another folder."""
    make_python(tmp_path, SGLANG.format(root=str(Path(__file__).parents[3])))
    monkeypatch.chdir(tmp_path)
    options = {
        "engine.kind": "sglang",
        "engine.python": "./python",
        "engine.max_logprob_gap": 0.0,
        "name": "run",
        "steps": 1,
        "sample.problems_per_step": 2,
        "sample.group_size": 2,
        "eval.problems": 2,
        "eval.samples": 1,
    }
    train(apply_args(load_preset("quickstart"), options))
    rows = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert (tmp_path / "runs" / "run" / "engine" / "server0" / "server.log").is_file()


def test_ports_and_devices() -> None:
    assert len({free_port() for _ in range(5)}) > 1
    assert split_gpus([0, 1, 2, 3], 2) == [(0, 1), (2, 3)]
    assert split_gpus([], 2) == [(), ()]
