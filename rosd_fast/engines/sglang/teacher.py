"""A teacher on SGLang servers: its hidden states at the distilled tokens, over HTTP.

    micro-batches -> one POST a sample, teacher prompt + completion -> [N, H] states each

What comes back are the states after the final norm, which enter the head, so the loss is computed
from them as from those of a teacher in the trainer's process, at any temperature. The head itself
stays with the trainer. A server returns the states of the tokens that it did not find in its cache,
and reads its cache up to the first distilled token only: a prefix is computed once, and no state
that is needed is missing.
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rosd_fast.engines.sglang.client import Busy, Refused, ServerError, Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle, request_with_retries
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.types import PackedBatch

SERVER_ARGS = ("--return-hidden-states-mode", "full", "--chunked-prefill-size", "-1")
HOW_TO_START = "start it with " + " ".join(SERVER_ARGS)


class SglangTeacher:
    """Scores on `servers`, which keep the weights that they were started with.

    hidden_size: of the teacher, H. concurrency: requests under way at once. max_failures: as many
    of a request in a row end the run. request_timeout_s: for one request, however often it is
    tried. note: shows the user a line.
    """

    def __init__(
        self,
        servers: Sequence[ServerHandle],
        *,
        hidden_size: int,
        concurrency: int,
        max_failures: int,
        request_timeout_s: float,
        note: Callable[[str], None],
    ) -> None:
        if not servers:
            raise ValueError("a scorer needs a server")
        self.servers = list(servers)
        self.hidden_size = hidden_size
        self.note = note
        self._run = secrets.token_hex(4)
        self._slots = asyncio.Semaphore(concurrency)
        self._max_failures, self._timeout_s = max_failures, request_timeout_s
        self._version: str | None = None  # of the servers' weights, as the first answer says
        self._num_asked = 0

    async def states(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Of each micro-batch the [N, H] float32 states that predict its distilled tokens.

        Raises RunFailed when a server cannot be used, refuses a sample, or has other weights than
        before.
        """
        wanted = [_sequences(batch) for batch in batches]
        tasks = [
            asyncio.create_task(self.score(ids, first=first, affinity=affinity))
            for sequences in wanted
            for ids, first, affinity in sequences
        ]
        try:
            rows = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        none = torch.empty(0, self.hidden_size)
        return [torch.cat([none, *(next(rows) for _ in sequences)]) for sequences in wanted]

    async def score(self, ids: Sequence[int], *, first: int, affinity: str = "") -> Tensor:
        """[len(ids) - first, H] float32: the states at `ids[first:]`."""
        self._num_asked += 1
        name = f"{self._run}/score{self._num_asked}"

        async def ask(handle: ServerHandle, attempt: int) -> Tensor:
            await self._prepare(handle)
            request = {
                "rid": f"{name}#{attempt}",
                "input_ids": list(ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": first,  # the cache is not read beyond
                "return_hidden_states": True,
            }
            try:
                answer = await handle.post(
                    "/generate", request, timeout_s=self._timeout_s, watch=True
                )
            except Refused as error:
                raise RunFailed(
                    f"the teacher's server refuses a sequence of {len(ids)} tokens ({error}); "
                    f"lower teacher.max_prompt_tokens, or, for another cause, {HOW_TO_START}"
                ) from None
            return self._read(answer, handle, num_tokens=len(ids), first=first)

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
        """Stop our own servers."""
        await asyncio.gather(*(handle.close() for handle in self.servers))

    def _failed(self, handle: ServerHandle, error: ServerError) -> None:
        if not isinstance(error, Busy):
            if not handle.down:
                self.note(f"teacher: {error}; trying again")
            handle.mark_suspect()

    async def _prepare(self, handle: ServerHandle) -> None:
        async with handle.lock:
            if await handle.ensure_up() and handle.num_starts > 1:
                self.note(f"teacher: {handle.name} was started again")

    def _read(self, answer: Any, handle: ServerHandle, *, num_tokens: int, first: int) -> Tensor:
        try:
            meta = answer["meta_info"]
            version, num_cached = meta["weight_version"], meta["cached_tokens"]
            prompt_states = meta["hidden_states"][0]
        except (KeyError, TypeError, IndexError) as error:
            raise Unreachable(
                handle.url, f"gave an answer without {error}: {HOW_TO_START}"
            ) from None
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise Busy(handle.url, f"gave up a request ({reason.get('message')})")
        self._version = self._version or version
        if version != self._version:
            raise RunFailed(
                f"{handle.url}: the teacher's weights have changed, from {self._version} to "
                f"{version}; nothing but its own requests may go to a teacher's server"
            )
        try:
            states = np.asarray(prompt_states, dtype=np.float32).reshape(-1, self.hidden_size)
        except ValueError:
            raise RunFailed(
                f"{handle.url}: the teacher's states are not {self.hidden_size} wide: the server "
                "runs another model"
            ) from None
        if len(states) != num_tokens - num_cached or num_cached > first:
            raise Unreachable(
                handle.url,
                f"gave {len(states)} states of {num_tokens} tokens, {num_cached} of them from its "
                f"cache: {HOW_TO_START}",
            )
        if not np.isfinite(states).all():
            raise UserError(
                "the teacher's states are not finite",
                where=handle.url,
                fix="Check the model's weights",
            )
        return torch.from_numpy(states[first - num_cached :])


def _sequences(batch: PackedBatch) -> list[tuple[list[int], int, str]]:
    """Of each sample its ids, the first row that is asked for, and what its cache is shared by."""
    found = []
    for index, rollout_id in enumerate(batch.rollout_ids):
        rows = batch.teacher.gather[batch.sample_index == index]
        # A sequence ends at its last distilled token, and a span has no holes.
        ids = batch.teacher.sequence(int(rows[-1]))
        found.append((ids, len(ids) - len(rows), rollout_id.rpartition("/")[0]))
    return found
