"""Rollouts in the trainer's own process, with any causal language model of transformers.

    requests -> slices -> prefill each prompt once, copy its cache to n rows -> decode -> retire
                  ^_________ waiting slices take the place of finished rows __________|

The forward pass is the model's own (`forward`), over a preallocated KV cache (`kv_cache`). `decode`
manages the rows, and `sampling` draws from random numbers keyed by (seed, request id, index) only.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.local.decode import DecodeBatch, Finished, RequestSlice
from rosd_fast.engines.local.forward import NextToken, Way
from rosd_fast.engines.local.grammar_mask import Constraint, GrammarCompiler
from rosd_fast.engines.requests import check_ids, completion_limit
from rosd_fast.errors import UserError
from rosd_fast.model.weight_stream import WeightStream
from rosd_fast.types import Generation, GenerationRequest

BURST = 8  # decoding steps between two returns to the event loop
RETIRE_FRAC = 1 / 8  # fraction of finished completions at which the batch is compacted


class LocalEngine(RolloutEngine):
    """Samples with `model`, which may be the module that is being trained.

    model: a causal language model. It computes in eval mode and is left in its previous mode.
    max_rows: maximum number of completions decoded together.
    pad_token_id: pads shorter prompts on the left; these positions are masked.
    tokenizer: compiles the grammars of requests; None: a request with a grammar is an error.
    shares_learner_weights: `model` is the trained module, so `load_weights` only sets the version.

    way: how `model` is run: with a cache and padded prompts, with a cache and prompts of equal
        length, or without a cache (`forward`).
    note: what the user should know about `way`, in one line; mostly empty.

    Raises UserError for a model that is not causal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rows: int = 256,
        pad_token_id: int = 0,
        tokenizer: Any = None,
        shares_learner_weights: bool = False,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, must be at least 1")
        self.model = model
        self.max_rows = max_rows
        self.shares_learner_weights = shares_learner_weights
        self._forward = NextToken(model)
        self.way: Way = self._forward.way
        self.note = ""
        if self.way == "recompute":
            self.note = (
                "local engine: each token reads its whole row again, which is slow: "
                f"{type(model).__name__} {self._forward.why_recompute}"
            )
        # It is never attended to, so any id with an embedding will do.
        self.pad_token_id = pad_token_id if 0 <= pad_token_id < self._forward.vocab_size else 0
        self._num_running = 0
        self._grammars = None
        if tokenizer is not None:
            self._grammars = GrammarCompiler(tokenizer, self._forward.vocab_size)

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Return all completions of all requests, ordered by request and then by index.

        Equal seeds, ids and weights give equal samples, whatever else is sampled at the same time
        and whatever `max_rows` is (except for the rounding of batched matrix products).
        Log-probabilities are those of the distribution that was sampled from; for temperature 0,
        those at temperature 1. A completion that reaches the end of the model's context stops
        there, with finish reason "length".

        Raises UserError when a prompt does not fit the context or the logits are not finite,
        ValueError for parameters out of range and for an id that two requests share.
        """
        done: dict[str, list[Generation]] = {}
        async for generations in self._complete(requests, on_tokens):
            done[generations[0].request_id] = generations
        return [generation for request in requests for generation in done[request.id]]

    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> AsyncIterator[list[Generation]]:
        """Like `generate`, but yield each request's completions as soon as they are done."""
        async for generations in self._complete(requests, on_tokens):
            yield generations

    async def load_weights(
        self, weights: Mapping[str, Tensor] | WeightStream, *, version: int
    ) -> None:
        """Copy `weights` (keyed by state-dict name) into the model once no request is in flight.

        Nothing is copied with `shares_learner_weights`, nor from tensors that already are the
        model's. One name is enough for tied weights; buffers may be missing. Raises ValueError,
        and changes nothing, when a name is unknown or missing or a shape differs.
        """
        state = self.model.state_dict()
        if self.shares_learner_weights:
            weights = {}
        else:
            if isinstance(weights, WeightStream):
                weights = weights.whole()
            _check_weights(state, dict(self.model.named_parameters()), weights)
        while self._num_running:
            await asyncio.sleep(0.001)
        with torch.no_grad():
            for name, source in weights.items():
                if source.data_ptr() != state[name].data_ptr():
                    state[name].copy_(source)
        self.policy_version = version

    async def close(self) -> None:
        """Do nothing: between calls the engine holds only the model, which is the caller's."""

    async def _complete(
        self, requests: Sequence[GenerationRequest], on_tokens: Callable[[int], None] | None
    ) -> AsyncIterator[list[Generation]]:
        """Yield each request's completions as soon as they are done."""
        slices = self._slices(requests)
        if not slices:
            return
        done: defaultdict[str, dict[int, Generation]] = defaultdict(dict)
        self._num_running += 1
        try:
            async for finished in self._decode(slices, on_tokens):
                for item in finished:
                    own = done[item.request.id]
                    own[item.index] = self._generation(item)
                    if len(own) == item.request.n:
                        del done[item.request.id]
                        yield [own[index] for index in range(item.request.n)]
        finally:
            self._num_running -= 1

    async def _decode(
        self, slices: Sequence[RequestSlice], on_tokens: Callable[[int], None] | None
    ) -> AsyncIterator[list[Finished]]:
        """Decode all slices; yield what has finished after each burst."""
        waiting = deque(slices)
        batch = DecodeBatch(
            self._forward, slices, max_rows=self.max_rows, pad_token_id=self.pad_token_id
        )
        while waiting or batch.num_completions:
            with self._forward.running():
                taken, done = self._burst(batch, waiting)
            if on_tokens is not None and taken:
                on_tokens(taken)
            if done:
                yield done
            await asyncio.sleep(0)  # lets signals and other tasks run

    def _burst(
        self, batch: DecodeBatch, waiting: deque[RequestSlice]
    ) -> tuple[int, list[Finished]]:
        """Admit slices, decode a few steps, retire.

        Returns the number of new tokens and the finished completions.
        """
        taken = batch.admit(_next_slices(waiting, batch.num_free)) if waiting else 0
        for _ in range(BURST):
            if batch.num_finished >= max(1, RETIRE_FRAC * batch.num_completions):
                return taken, batch.retire()
            taken += batch.step()
        return taken, []

    def _slices(self, requests: Sequence[GenerationRequest]) -> list[RequestSlice]:
        """Check requests and cut them to at most `max_rows` rows each, longest prompt first."""
        requests = sorted(requests, key=lambda request: -len(request.prompt_ids))
        check_ids(requests)
        slices = []
        for request, constraint in zip(requests, self._constraints(requests), strict=True):
            limit = completion_limit(
                request,
                vocab_size=self._forward.vocab_size,
                context_length=self._forward.context_length,
            )
            for first in range(0, request.n, self.max_rows):
                indices = range(first, min(first + self.max_rows, request.n))
                slices.append(RequestSlice(request, indices, limit, constraint))
        return slices

    def _constraints(
        self, requests: Sequence[GenerationRequest]
    ) -> list[Future[Constraint] | None]:
        if self._grammars is not None:
            return self._grammars.constraints(requests)
        for request in requests:
            if request.grammar is not None:
                raise ValueError(
                    f"request {request.id}: has a grammar, but the engine has no tokenizer"
                )
        return [None] * len(requests)

    def _generation(self, done: Finished) -> Generation:
        if not math.isfinite(sum(done.logprobs)):
            raise UserError(
                "the model's logits are not finite",
                where=f"request {done.request.id}, weights of version {self.policy_version}",
                fix="Lower the learning rate, or check the model's weights",
            )
        stopped = done.ids[-1] in done.request.params.stop_token_ids
        return Generation(
            request_id=done.request.id,
            index=done.index,
            completion_ids=tuple(done.ids),
            logprobs=tuple(done.logprobs),
            finish_reason="stop" if stopped else "length",
            policy_version=self.policy_version,
        )


def _next_slices(waiting: deque[RequestSlice], num_free: int) -> list[RequestSlice]:
    """Take slices from the front of `waiting` while they fit into `num_free` rows."""
    taken = []
    while waiting and len(waiting[0].indices) <= num_free:
        taken.append(waiting.popleft())
        num_free -= len(taken[-1].indices)
    return taken


def _check_weights(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless every weight fits a tensor of `state` and no parameter lacks one."""
    for name, tensor in weights.items():
        if name not in state:
            raise ValueError(f"weight {name} is not one of the model's")
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"weight {name} has the shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(state[name].shape)}"
            )
    covered = {state[name].data_ptr() for name in weights}  # one name is enough for tied weights
    for name, parameter in parameters.items():
        if name not in weights and parameter.data_ptr() not in covered:
            raise ValueError(f"weight {name} is missing")
