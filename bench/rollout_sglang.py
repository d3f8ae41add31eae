"""The SGLang engine on a real server on this machine: cache, pipeline, sync, faults, bytes.

    make sglang                                                   # builds the environment
    python bench/rollout_sglang.py --python .venv-sglang/bin/python

pipeline  seconds from the first request of a step to its last reflection, alternately `streamed`
          and `barrier`. The bench prescribes unequal lengths of rollouts: one group in
          `--long-every` samples `--long` tokens, the others `--short`. The cached and shareable
          fractions of prompt tokens are those of these steps.
sync      seconds to load all weights into the server, by folder or by broadcast, weight check
          included.
faults    the scheduler is killed, then stopped, in mid-step, and a proxy breaks three answers (a
          reset in mid-body, half a JSON text, an error 500). `lost`: completions that are missing
          or whose log-probabilities are not those of the trainer's model.
bytes     received per sampled token with its log-probability; and, from a teacher server, per
          distilled token of a step: its state, and those of uncached prompt tokens.

Adds a row to bench/results/rollout_sglang.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from harness import RESULTS, append_row, environment

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.lifecycle import Engines
from rosd_fast.engines.sglang.broadcast_sync import DistributedSync
from rosd_fast.engines.sglang.client import Endpoint
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import ManagedServer
from rosd_fast.engines.weight_check import token_logprobs
from rosd_fast.pipeline import sample_and_annotate
from rosd_fast.report.progress import Hidden
from rosd_fast.rollout.sample import problem_prompt
from rosd_fast.run import Run, open_run
from rosd_fast.types import Generation, GenerationRequest, SamplingParams

CSV = RESULTS / "rollout_sglang.csv"
FAULTS = ("reset", "half", "500")
MAX_GAP_NATS = 1e-3
TEMPLATE = "{problem}\n\nAn attempt:\n{rollout}\n\nQuote the first wrong words and explain."


def main() -> None:
    args = parse_arguments()
    if not args.python:
        print("skipped: no SGLang; see the top of bench/rollout_sglang.py")
        return
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(args, folder)
        with open_run(config) as run:
            row = asyncio.run(measure(run, args))
    append_row(CSV, {**environment(), **row})
    for name, value in row.items():
        print(f"{name:24} {value}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=os.environ.get("ROSD_SGLANG_PYTHON", ""))
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--long", type=int, default=400, help="tokens of the long rollouts")
    parser.add_argument("--short", type=int, default=40, help="tokens of the others")
    parser.add_argument("--long-every", type=int, default=16, help="one group in this many is long")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def make_config(args: argparse.Namespace, folder: str) -> Config:
    options = {
        "out": folder,
        "name": "run",
        "steps": 1,
        "data.dev": None,
        "data.dev_ood": None,
        "sample.problems_per_step": args.problems,
        "sample.group_size": args.group_size,
        "select.on_no_success": "keep",
        "reflect.wrong_template": TEMPLATE,
        "engine.kind": "sglang",
        "engine.python": args.python,
        "engine.server_args": "--max-total-tokens 32768",
        "engine.health_every_s": 2.0,
        "engine.health_timeout_s": 10.0,
        "teacher.backend": "sglang",
        "teacher.server_args": "--max-total-tokens 32768",
    }
    return apply_args(load_preset("quickstart"), options)


class UnequalLengths(RolloutEngine):
    """Forwards requests with a prescribed length of each rollout."""

    streams = True

    def __init__(self, engine: SglangEngine, args: argparse.Namespace) -> None:
        self.engine, self.args = engine, args

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        return await self.engine.generate(self.with_lengths(requests), on_tokens=on_tokens)

    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> AsyncIterator[list[Generation]]:
        async for generations in self.engine.stream(
            self.with_lengths(requests), on_tokens=on_tokens
        ):
            yield generations

    def with_lengths(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """Set the lengths. Long requests come last, since a queue cannot know which are long."""
        changed = []
        for index, request in enumerate(requests):
            every = self.args.long_every
            length = self.args.long if index % every == every - 1 else self.args.short
            params = replace(request.params, max_new_tokens=length, stop_token_ids=())
            changed.append(replace(request, params=params))
        return changed

    async def load_weights(self, weights: Any, *, version: int) -> None:
        await self.engine.load_weights(weights, version=version)

    async def close(self) -> None:
        await self.engine.close()


async def measure(run: Run, args: argparse.Namespace) -> dict[str, str]:
    async with run.open_engines() as engines:
        engine = engines.student
        assert isinstance(engine, SglangEngine)
        await engine.load_weights(run.learners.weights(), version=0)
        # The first grammar takes seconds.
        await sample_and_annotate(run.inputs, engines, 1, Hidden())
        row = await measure_bytes(run, engine)
        row |= await measure_sync(run, engine, args.repeats)
        row |= await measure_pipelines(run, engine, args)
        row |= await measure_scoring(run, engines)
        row |= await measure_faults(run, engine)
    return row


async def measure_pipelines(
    run: Run, engine: SglangEngine, args: argparse.Namespace
) -> dict[str, str]:
    seconds: dict[str, list[float]] = {"streamed": [], "barrier": []}
    cache_metrics: list[dict[str, float]] = []
    engines = Engines(student=UnequalLengths(engine, args))
    for _ in range(args.repeats):
        for name, times in seconds.items():
            options = run.config.engine.model_copy(update={"pipeline": name})
            inputs = replace(run.inputs, config=run.config.model_copy(update={"engine": options}))
            # This flushes the cache, as each weight sync does.
            await engine.load_weights(run.learners.weights(), version=engine.policy_version + 1)
            engine.take_metrics()
            start = time.perf_counter()
            await sample_and_annotate(inputs, engines, 1, Hidden())
            times.append(time.perf_counter() - start)
            cache_metrics.append(engine.take_metrics())
    streamed, barrier = (statistics.median(seconds[name]) for name in ("streamed", "barrier"))
    cached, shareable = (
        statistics.mean(metrics[f"rollout/{name}_frac"] for metrics in cache_metrics)
        for name in ("cached", "shareable")
    )
    return {
        "groups": f"{args.problems} x {args.group_size}",
        "long_every": str(args.long_every),
        "tokens": f"{args.short} or {args.long}",
        "streamed_s": f"{streamed:.2f}",
        "barrier_s": f"{barrier:.2f}",
        "streamed_vs_barrier": f"{streamed / barrier:.3f}",
        "cached_frac": f"{cached:.4f}",
        "shareable_frac": f"{shareable:.4f}",
        "cached_of_shareable": f"{cached / shareable:.4f}",
    }


async def measure_sync(run: Run, engine: SglangEngine, repeats: int) -> dict[str, str]:
    syncs = {"disk": engine._sync, "distributed": DistributedSync()}
    row = {}
    for name, engine._sync in syncs.items():
        seconds = []
        await engine.load_weights(
            run.learners.weights(), version=engine.policy_version + 1
        )  # joins the process group
        for _ in range(repeats):
            start = time.perf_counter()
            await engine.load_weights(run.learners.weights(), version=engine.policy_version + 1)
            seconds.append(time.perf_counter() - start)
        row[f"sync_{name}_s"] = f"{statistics.median(seconds):.3f}"
    await syncs["distributed"].close()
    engine._sync = syncs["disk"]
    return row


async def measure_bytes(run: Run, engine: SglangEngine) -> dict[str, str]:
    before = engine.servers[0].num_bytes
    generations = await engine.generate(make_requests(run, "bytes"))
    tokens = sum(len(generation.completion_ids) for generation in generations)
    return {"bytes_per_token": f"{(engine.servers[0].num_bytes - before) / tokens:.1f}"}


async def measure_scoring(run: Run, engines: Engines) -> dict[str, str]:
    teacher = engines.teacher_server
    assert teacher is not None
    sampled = await sample_and_annotate(run.inputs, engines, 1, Hidden())
    training = run.inputs.method.build(
        sampled.selection.kept, sampled.verdicts, sampled.annotations, Hidden()
    )
    batches = pack(training.samples, max_tokens=run.config.pack.max_tokens)
    await teacher.score(run.weight_check_ids, first=1)  # starts the server
    before, start = teacher.servers[0].num_bytes, time.perf_counter()
    tokens = sum(len(states) for states in await teacher.states(batches))
    seconds = time.perf_counter() - start
    num_bytes = teacher.servers[0].num_bytes - before
    return {
        "scored_tokens": str(tokens),
        "bytes_per_scored_token": f"{num_bytes / tokens:.0f}",
        "scored_tokens_per_s": f"{tokens / seconds:.0f}",
    }


async def measure_faults(run: Run, engine: SglangEngine) -> dict[str, str]:
    """Count lost completions under three broken answers, a killed and a stopped scheduler."""
    server = engine.servers[0].managed
    assert server is not None
    requests = make_requests(run, "faults")
    lost = 0
    start = time.perf_counter()
    for number in (signal.SIGKILL, signal.SIGSTOP):
        in_flight = asyncio.create_task(engine.generate(requests))
        await asyncio.sleep(0.2)
        os.kill(scheduler(server), number)
        lost += count_lost(run, requests, await in_flight)
    retries = engine.take_metrics()["rollout/num_retries"]
    assert server.endpoint is not None
    options = run.config.engine
    async with Proxy(server.endpoint) as proxy:
        proxied = SglangEngine(
            [
                ServerHandle(
                    Endpoint(proxy.url),
                    name=proxy.url,
                    health_every_s=options.health_every_s,
                    health_timeout_s=options.health_timeout_s,
                )
            ],
            sync=engine._sync,
            vocab_size=engine.vocab_size,
            context_length=engine.context_length,
            weight_check_ids=(),
            expected_logprobs=None,
            max_logprob_gap=0.0,
            concurrency=options.concurrency,
            max_failures=options.max_failures,
            request_timeout_s=options.request_timeout_s,
            colocated=False,
            note=lambda text: None,
        )
        proxied._trainer_id, proxied.policy_version = engine._trainer_id, engine.policy_version
        lost += count_lost(run, requests, await proxied.generate(requests))
        retries += proxied.take_metrics()["rollout/num_retries"]
        for handle in proxied.servers:
            await handle.close()
        assert not proxy.faults, "not every fault occurred"
    return {
        "faults": str(2 + len(FAULTS)),
        "lost": str(lost),
        "retries": f"{retries:.0f}",
        "faults_s": f"{time.perf_counter() - start:.0f}",
    }


def make_requests(run: Run, name: str) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=f"{name}/{problem.id}",
            prompt_ids=problem_prompt(problem, run.inputs.chats.student, 256),
            params=SamplingParams(
                max_new_tokens=96, stop_token_ids=run.inputs.model.stop_token_ids
            ),
            n=run.config.sample.group_size,
            affinity=problem.id,
        )
        for problem in run.inputs.stream.batch(1)
    ]


def count_lost(
    run: Run, requests: Sequence[GenerationRequest], generations: Sequence[Generation]
) -> int:
    """Count completions that are missing or that the trainer's model did not sample."""
    prompts = {request.id: request.prompt_ids for request in requests}
    good = 0
    for item in generations:
        prompt = prompts[item.request_id]
        own = token_logprobs(run.inputs.model.model, [*prompt, *item.completion_ids])[
            len(prompt) - 1 :
        ]
        good += all(abs(a - b) < MAX_GAP_NATS for a, b in zip(own, item.logprobs, strict=True))
    return sum(request.n for request in requests) - good


def scheduler(server: ManagedServer) -> int:
    """The id of the process that holds the model."""
    assert server._process is not None
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if b"scheduler" in path.read_bytes() and server._process.pid in ancestors(path.parent):
            return int(path.parent.name)
    raise SystemExit("the server has no scheduler")


def ancestors(process: Path) -> list[int]:
    """The ids of the parent of a process, given as /proc/ID, of its parent, and so on."""
    ids = []
    while int(process.name) > 1:
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        ids.append(int(parent))
        process = Path("/proc") / parent
        if parent == "0":
            break
    return ids


class Proxy:
    """Forwards requests to a server and breaks the first answers to /generate."""

    def __init__(self, target: Endpoint) -> None:
        self.target, self.faults = target, deque(FAULTS)
        self.url = ""

    async def __aenter__(self) -> Proxy:
        app = web.Application()
        app.add_routes([web.route("*", "/{path:.*}", self.handle)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._session = ClientSession(headers=self.target._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        async with self._session.request(
            request.method, self.target.url + request.path, data=await request.read(),
            headers={"Content-Type": "application/json"},
        ) as answer:  # fmt: skip
            data, status = await answer.read(), answer.status
        fault = self.faults.popleft() if self.faults and request.path == "/generate" else ""
        if fault == "500":
            return web.Response(status=500)
        if fault == "half":
            return web.Response(body=data[: len(data) // 2])
        if fault == "reset":
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(body=data, status=status, content_type="application/json")


if __name__ == "__main__":
    main()
