"""Rollouts from SGLang servers over HTTP: token ids in, token ids and log-probabilities out.

    requests -> server by affinity -> one POST per request, for n completions -> Generations

All requests of a problem, its rollouts and its reflections, go to one server, whose cache then
holds their shared prefix. A request whose server fails is retried, on another server or after a
restart. Each answer names the weights that it was sampled with, so that no completion of another
weight version or another trainer is used.

Unlike with the local engine, the server draws the random numbers: equal seeds do not give equal
samples.

The endpoints are those of SGLang 0.5.23 (`entrypoints/http_server.py`): /generate, whose fields are
in `GenerateReqInput` of `managers/io_struct.py`, /release_memory_occupation and
/resume_memory_occupation (docs.sglang.io/advanced_features/sglang_for_rl.html).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.requests import check_ids, completion_limit
from rosd_fast.engines.sglang.cache_stats import PrefixCacheStats
from rosd_fast.engines.sglang.client import Busy, Refused, ServerError, Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle, request_with_retries
from rosd_fast.engines.sglang.slots import Slots
from rosd_fast.engines.sglang.weight_sync import SYNC_TIMEOUT_S, WeightSync
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.weight_stream import WeightStream, as_stream
from rosd_fast.types import Generation, GenerationRequest

WEIGHT_CHECK_TIMEOUT_S = 120.0


class StaleWeights(ServerError):
    """A completion was sampled with other weights than the current ones."""


class SglangEngine(RolloutEngine):
    """Samples on SGLang servers.

    servers: managed or remote servers.
    sync: sends weights to the servers.
    vocab_size: prompt ids at or above it, which would crash a server, are refused.
    context_length: maximum number of tokens of prompt and completion.
    weight_check_ids: the prompt of the weight check after each sync.
    expected_logprobs: returns the trainer's log-probabilities of `weight_check_ids[1:]`; None: no
        weight check.
    max_logprob_gap: largest accepted difference in the weight check, in nats; 0: no check.
    concurrency: maximum number of requests in flight.
    max_failures: failures of one request in a row that end the run.
    request_timeout_s: timeout of one request, for all its completions and including retries.
    colocated: the servers release their memory between `release_memory` and `load_weights`.
    note: shows the user a line.
    """

    streams = True

    def __init__(
        self,
        servers: Sequence[ServerHandle],
        *,
        sync: WeightSync,
        vocab_size: int,
        context_length: int,
        weight_check_ids: Sequence[int],
        expected_logprobs: Callable[[Sequence[int]], list[float]] | None,
        max_logprob_gap: float,
        concurrency: int,
        max_failures: int,
        request_timeout_s: float,
        colocated: bool,
        note: Callable[[str], None],
    ) -> None:
        if not servers:
            raise ValueError("an engine needs a server")
        self.servers = list(servers)
        self.vocab_size, self.context_length = vocab_size, context_length
        self.note = note
        self._sync = sync
        self._trainer_id = secrets.token_hex(4)  # distinguishes our weights from other trainers'
        self._weight_check_ids = tuple(weight_check_ids)
        self._expected_logprobs, self._max_logprob_gap = expected_logprobs, max_logprob_gap
        self._expected: list[float] = []  # log-probabilities of the weight check, current weights
        self._slots = Slots(concurrency)
        self._max_failures = max_failures
        self._timeout_s = request_timeout_s
        self._colocated = colocated
        self._cache_stats = PrefixCacheStats()
        self._counts = {"retries": 0, "retractions": 0, "restarts": 0}
        self._idle = asyncio.Condition()
        self._num_running = 0

    @property
    def tag(self) -> str:
        """The name of the current weights on the servers."""
        return f"{self._trainer_id}-{self.policy_version}"

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Return all completions of all requests, ordered by request and then by index.

        Log-probabilities are those at the sampling temperature, before `top_p` and `top_k`; for
        temperature 0, those at temperature 1. A completion that reaches the end of the model's
        context stops there, with finish reason "length".

        Raises UserError when a prompt does not fit the context or the server's KV cache, ValueError
        for parameters out of range, an invalid grammar and an id that two requests share, and
        RunFailed after `max_failures` failures in a row.
        """
        by_id: dict[str, list[Generation]] = {}
        async for generations in self.stream(requests, on_tokens=on_tokens):
            by_id[generations[0].request_id] = generations
        return [generation for request in requests for generation in by_id[request.id]]

    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> AsyncIterator[list[Generation]]:
        """Like `generate`, but yield each request's completions as soon as they are done."""
        check_ids(requests)
        limits = [self._limit(request) for request in requests]
        tasks = [
            asyncio.create_task(self._complete(request, limit))
            for request, limit in zip(requests, limits, strict=True)
        ]
        try:
            for next_done in asyncio.as_completed(tasks):
                generations = await next_done
                if on_tokens is not None:
                    on_tokens(sum(len(item.completion_ids) for item in generations))
                yield generations
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def load_weights(
        self, weights: Mapping[str, Tensor] | WeightStream, *, version: int
    ) -> None:
        """Copy `weights`, and load them into each server once no request is in flight.

        The first call starts managed servers. Raises RunFailed when no server could load the
        weights, or when a server fails the weight check.
        """
        await asyncio.to_thread(self._sync.stage, as_stream(weights), version)
        expected: list[float] = []
        if self._expected_logprobs is not None:
            expected = await asyncio.to_thread(self._expected_logprobs, self._weight_check_ids)
        async with self._idle:
            await self._idle.wait_for(lambda: self._num_running == 0)
            self.policy_version, self._expected = version, expected
            ready = await asyncio.gather(*(self._try_prepare(handle) for handle in self.servers))
        if not any(error is None for error in ready):
            raise RunFailed(f"no SGLang server could load the new weights: {ready[0]}")
        self._sync.discard_stale()

    async def release_memory(self) -> None:
        """Make colocated servers release the memory of weights and KV cache.

        Raises RunFailed when one does not, since the learner would run out of memory.
        """
        if not self._colocated:
            return
        for handle in self.servers:
            try:
                await handle.post("/release_memory_occupation", {}, timeout_s=SYNC_TIMEOUT_S)
            except ServerError as error:
                raise RunFailed(f"a server did not release its memory: {error}") from None
            handle.memory_released, handle.tag = True, None

    async def close(self) -> None:
        """Stop managed servers and remove what was written for them."""
        await self._sync.close()
        await asyncio.gather(*(handle.close() for handle in self.servers))

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call.

        rollout/num_retries, num_retractions, num_restarts: retried requests, completions that a
            server preempted for lack of memory, restarted servers.
        rollout/cached_frac, shareable_frac: see `PrefixCacheStats`.
        """
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        metrics = {f"rollout/num_{name}": float(count) for name, count in counts.items()}
        return metrics | self._cache_stats.take_metrics()

    def _limit(self, request: GenerationRequest) -> int:
        """Check a request and return the maximum number of tokens of its completions."""
        return completion_limit(
            request, vocab_size=self.vocab_size, context_length=self.context_length
        )

    async def _complete(self, request: GenerationRequest, limit: int) -> list[Generation]:
        """Return all completions of a request, retrying until they are complete."""
        async with self._slots.take(background=request.background), self._running():
            return await request_with_retries(
                lambda handle, attempt: self._try(request, limit, attempt, handle),
                self.servers,
                home=zlib.crc32((request.affinity or request.id).encode()),
                what=f"request {request.id}",
                max_failures=self._max_failures,
                timeout_s=self._timeout_s,
                failed=self._failed,
            )

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        async with self._idle:
            self._num_running += 1
        try:
            yield
        finally:
            async with self._idle:
                self._num_running -= 1
                self._idle.notify_all()

    async def _try(
        self, request: GenerationRequest, limit: int, attempt: int, handle: ServerHandle
    ) -> list[Generation]:
        """Send a request to a server once."""
        await self._prepare(handle)
        try:
            answer = await handle.post(
                "/generate",
                request_body(request, limit, attempt, trainer_id=self._trainer_id)
                | self._sync.request_fields(self.tag),
                timeout_s=self._timeout_s,
                watch=True,
            )
        except Refused as error:
            if self._sync.are_lost(error):
                raise StaleWeights(handle.url, f"has lost the weights {self.tag}") from None
            raise ValueError(f"request {request.id}: {error}") from None
        return self._read(request, limit, answer, handle)

    def _failed(self, handle: ServerHandle, error: ServerError) -> None:
        """Count a failure and, unless the server was only busy, have its health checked."""
        self._counts["retries"] += 1
        if isinstance(error, Busy):
            return
        if not handle.down:
            self.note(f"SGLang: {error}; retrying")
        handle.mark_suspect()

    async def _try_prepare(self, handle: ServerHandle) -> Exception | None:
        try:
            await self._prepare(handle)
        except ServerError as error:
            handle.mark_suspect()
            self.note(f"SGLang: {error}")
            return error
        return None

    async def _prepare(self, handle: ServerHandle) -> None:
        """Bring the server up, with the current weights. Raises ServerError or RunFailed."""
        async with handle.lock:
            if await handle.ensure_up():
                self._counts["restarts"] += handle.num_starts > 1
                if handle.num_starts > 1:
                    self.note(f"SGLang: {handle.name} was restarted")
            if handle.tag == self.tag:
                return
            handle.tag = None
            if handle.memory_released:
                await handle.post("/resume_memory_occupation", {}, timeout_s=SYNC_TIMEOUT_S)
                handle.memory_released = False
            await self._sync.push(handle, self.tag, self.policy_version)
            await self._check_weights(handle)
            handle.tag = self.tag

    async def _check_weights(self, handle: ServerHandle) -> None:
        """Raise RunFailed when the server's log-probabilities differ from the trainer's."""
        if self._expected_logprobs is None or not self._max_logprob_gap:
            return
        answer = await handle.post(
            "/generate",
            {
                "input_ids": list(self._weight_check_ids),
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            | self._sync.request_fields(self.tag),
            timeout_s=WEIGHT_CHECK_TIMEOUT_S,
        )
        received = [item[0] for item in answer["meta_info"]["input_token_logprobs"][1:]]
        pairs = zip(received, self._expected, strict=True)
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        if not abs(worst[0] - worst[1]) <= self._max_logprob_gap:
            raise RunFailed(
                f"{handle.url}: after loading the weights of version {self.policy_version}, "
                f"the server gives a token the log-probability {worst[0]:.4f} and the trainer "
                f"{worst[1]:.4f}, which differ by more than engine.max_logprob_gap = "
                f"{self._max_logprob_gap:g}"
            )

    def _read(
        self, request: GenerationRequest, limit: int, answer: Any, handle: ServerHandle
    ) -> list[Generation]:
        """Return the completions in an answer. Raises ServerError, RunFailed or UserError."""
        items = answer if isinstance(answer, list) else [answer]
        if len(items) != request.n:
            raise Unreachable(handle.url, f"sent {len(items)} completions instead of {request.n}")
        generations = []
        for index, item in enumerate(items):
            try:
                meta, ids = item["meta_info"], tuple(item["output_ids"])
                reason = meta["finish_reason"]
                logprobs = tuple(meta["output_token_logprobs"])
                version, num_cached = meta["weight_version"], meta["cached_tokens"]
            except (KeyError, TypeError, IndexError) as error:
                raise Unreachable(handle.url, f"sent an answer without {error}") from None
            if reason["type"] == "abort":
                raise Busy(handle.url, f"aborted a request ({reason.get('message')})")
            self._check_version(version, handle)
            if not math.isfinite(sum(logprobs)):
                raise UserError(
                    "the model's logits are not finite",
                    where=f"request {request.id}, weights of version {self.policy_version}",
                    fix="Lower the learning rate, or check the model's weights",
                )
            if reason["type"] == "length" and len(ids) < limit:
                raise UserError(
                    f"the server cut a completion at {len(ids)} of {limit} tokens: its KV cache "
                    "is too small",
                    where=f"request {request.id}",
                    fix="Lower sample.max_new_tokens, or raise --max-total-tokens or "
                    "--mem-fraction-static of the server",
                )
            self._cache_stats.add(request.prompt_ids, num_cached)
            self._counts["retractions"] += meta.get("num_retractions") or 0
            generations.append(
                Generation(
                    request_id=request.id,
                    index=index,
                    completion_ids=ids,
                    logprobs=logprobs,
                    finish_reason="stop" if reason["type"] == "stop" else "length",
                    policy_version=self.policy_version,
                )
            )
        return generations

    def _check_version(self, version: str, handle: ServerHandle) -> None:
        expected = self._sync.version_on(handle, self.tag)
        if version == expected:
            return
        trainer_id, _, number = version.rpartition("-")
        if trainer_id and trainer_id != self._trainer_id and number.isdecimal():
            raise RunFailed(
                f"{handle.url}: another trainer has loaded its weights ({version}, ours are "
                f"{expected}); a server can serve only one trainer"
            )
        raise StaleWeights(handle.url, f"sampled with the weights {version}, not {expected}")


def request_body(
    request: GenerationRequest, limit: int, attempt: int, *, trainer_id: str
) -> dict[str, Any]:
    """The body of a request to /generate."""
    params = request.params
    sampling: dict[str, Any] = {
        "n": request.n,
        "max_new_tokens": limit,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "stop_token_ids": list(params.stop_token_ids),
    }
    if request.grammar is not None:
        sampling["ebnf"] = request.grammar
    return {
        "rid": f"{trainer_id}/{request.id}#{attempt}",  # unique: a server refuses an id in flight
        "input_ids": list(request.prompt_ids),
        "sampling_params": sampling,
        "return_logprob": True,
    }
