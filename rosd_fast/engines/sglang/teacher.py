"""A teacher on SGLang servers: its hidden states at the distilled tokens, over HTTP.

    micro-batches -> one POST per sample, teacher prompt + completion -> [N, H] states each

The answer has the states after the final norm, which are the input of the head. The loss is
computed from them as from those of a teacher in the trainer's process, at any temperature. The head
itself stays with the trainer. Servers with the plugin of `states_plugin.py`, as all that the
trainer starts, send bytes; others send JSON.

SGLang returns states only for tokens outside its prefix cache. `logprob_start_len` limits cache
reads to the tokens before the first distilled one, so prefixes are reused and no needed state is
missing. (SGLang 0.5.23: `GenerateReqInput` in `managers/io_struct.py`, endpoint `/generate`.)
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rosd_fast.engines.sglang.client import Busy, Refused, ServerError, Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle, request_with_retries
from rosd_fast.engines.sglang.states_hook import KEY
from rosd_fast.engines.sglang.states_plugin import unpacked
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.types import PackedBatch

SERVER_ARGS = ("--return-hidden-states-mode", "full", "--chunked-prefill-size", "-1")
HOW_TO_START = "start it with " + " ".join(SERVER_ARGS)


class SglangTeacher:
    """Computes the teacher's states on servers, which keep the weights they were started with.

    servers: the servers, all with the same model.
    hidden_size: H of the teacher.
    concurrency: maximum number of requests in flight.
    max_failures: failures of one request in a row that end the run.
    request_timeout_s: timeout of one request, including its retries.
    states_folder: where servers on this machine write states; None: they send them. It is removed
        at the end.
    note: shows the user a line.
    """

    def __init__(
        self,
        servers: Sequence[ServerHandle],
        *,
        hidden_size: int,
        concurrency: int,
        max_failures: int,
        request_timeout_s: float,
        states_folder: Path | None = None,
        note: Callable[[str], None],
    ) -> None:
        if not servers:
            raise ValueError("a teacher needs a server")
        self.servers = list(servers)
        self.hidden_size = hidden_size
        self.note = note
        self._trainer_id = secrets.token_hex(4)
        self._slots = asyncio.Semaphore(concurrency)
        self._max_failures, self._timeout_s = max_failures, request_timeout_s
        self._states_folder = states_folder
        self._version: str | None = None  # weight version of the first answer
        self._num_asked = 0

    async def states(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Return for each micro-batch the [N, H] float32 states that predict its distilled tokens.

        Raises RunFailed when a server cannot be used, refuses a sample, or has changed its weights.
        """
        wanted = [_sequences(batch) for batch in batches]
        tasks = [
            asyncio.create_task(self.score(ids, first=first, affinity=affinity))
            for sequences in wanted
            for ids, first, affinity in sequences
        ]
        try:
            states = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        none = torch.empty(0, self.hidden_size)
        return [torch.cat([none, *(next(states) for _ in sequences)]) for sequences in wanted]

    async def score(self, ids: Sequence[int], *, first: int, affinity: str = "") -> Tensor:
        """Return the states at `ids[first:]`, [len(ids) - first, H] float32."""
        self._num_asked += 1
        name = f"{self._trainer_id}/score{self._num_asked}"

        async def ask(handle: ServerHandle, attempt: int) -> Tensor:
            await self._prepare(handle)
            request = {
                "rid": f"{name}#{attempt}",
                "input_ids": list(ids),
                "sampling_params": {
                    "max_new_tokens": 1,
                    "temperature": 0,
                    "custom_params": {KEY: {"first": first}},
                },
                "return_logprob": True,
                "logprob_start_len": first,  # the cache is read only up to here
                "return_hidden_states": True,
            }
            try:
                answer = await handle.post(
                    "/generate", request, timeout_s=self._timeout_s, watch=True
                )
            except Refused as error:
                raise RunFailed(
                    f"the teacher server refuses a sequence of {len(ids)} tokens ({error}); "
                    f"lower teacher.max_prompt_tokens or, if the cause is another, {HOW_TO_START}"
                ) from None
            return await asyncio.to_thread(
                self._read, answer, handle, num_tokens=len(ids), first=first
            )

        async with self._slots:
            return await request_with_retries(
                ask,
                self.servers,
                home=zlib.crc32(affinity.encode()),
                what=f"scoring {len(ids)} tokens",
                max_failures=self._max_failures,
                timeout_s=self._timeout_s,
                failed=self._failed,
            )

    async def close(self) -> None:
        """Stop managed servers and close connections."""
        await asyncio.gather(*(handle.close() for handle in self.servers))
        if self._states_folder is not None:
            shutil.rmtree(self._states_folder, ignore_errors=True)

    def _failed(self, handle: ServerHandle, error: ServerError) -> None:
        if not isinstance(error, Busy):
            if not handle.down:
                self.note(f"teacher: {error}; retrying")
            handle.mark_suspect()

    async def _prepare(self, handle: ServerHandle) -> None:
        async with handle.lock:
            if await handle.ensure_up() and handle.num_starts > 1:
                self.note(f"teacher: {handle.name} was restarted")

    def _read(self, answer: Any, handle: ServerHandle, *, num_tokens: int, first: int) -> Tensor:
        try:
            meta = answer["meta_info"]
            version, num_cached = meta["weight_version"], meta["cached_tokens"]
            records = meta.get(KEY)
            sent = meta["hidden_states"][0] if records is None else records[0]
        except (KeyError, TypeError, IndexError) as error:
            raise Unreachable(
                handle.url, f"sent an answer without {error}: {HOW_TO_START}"
            ) from None
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise Busy(handle.url, f"aborted a request ({reason.get('message')})")
        self._version = self._version or version
        if version != self._version:
            raise RunFailed(
                f"{handle.url}: the teacher's weights have changed, from {self._version} to "
                f"{version}; a teacher server must serve only this run"
            )
        begin, states = self._unpacked(sent, handle, begin=num_cached)
        if states.shape[1:] != (self.hidden_size,):
            raise RunFailed(
                f"{handle.url}: the teacher's states are not {self.hidden_size} wide: the server "
                "runs another model"
            )
        if begin > first or begin + len(states) != num_tokens:
            raise Unreachable(
                handle.url,
                f"sent {len(states)} states for {num_tokens} tokens, {num_cached} of them cached: "
                f"{HOW_TO_START}",
            )
        if not bool(torch.isfinite(states).all()):
            raise UserError(
                "the teacher's states are not finite",
                where=handle.url,
                fix="Check the model's weights",
            )
        return states[first - begin :]

    def _unpacked(
        self, sent: list[Any] | Mapping[str, Any], handle: ServerHandle, *, begin: int
    ) -> tuple[int, Tensor]:
        """The position of the first state that was sent, and the states.

        begin: of a list of numbers, which has all states that were computed.
        """
        if isinstance(sent, Mapping):
            try:
                return unpacked(sent, self._states_folder)
            except (KeyError, TypeError, ValueError, OSError) as error:
                raise Unreachable(handle.url, f"sent states that are not whole ({error})") from None
        try:
            states = np.asarray(sent, dtype=np.float32).reshape(-1, self.hidden_size)
        except ValueError:
            return begin, torch.empty(0)  # of another width
        return begin, torch.from_numpy(states)


def _sequences(batch: PackedBatch) -> list[tuple[list[int], int, str]]:
    """For each distilled sample: its token ids, the first position whose state is needed, and the
    affinity.

    Samples of equal affinity, those of one problem, share a server's prefix cache.
    """
    sequences = []
    if batch.teacher is None:
        return sequences
    for index, problem_id in enumerate(batch.problem_ids):
        positions = batch.teacher.gather[batch.sample_index == index]
        if not len(positions):
            continue
        # A sequence ends at its last distilled token, and a span has no gaps.
        ids = batch.teacher.sequence(int(positions[-1]))
        sequences.append((ids, len(ids) - len(positions), problem_id))
    return sequences
