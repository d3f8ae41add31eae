"""The batch of completions that are decoded together: rows join, take a token each, and retire.

The state of the rows is a set of tensors whose first dimension is the row, so that a step costs a
handful of small operations whatever the number of rows. Python handles a row only when it joins
and when it retires.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rosd_fast.engines.local.forward import NextToken
from rosd_fast.engines.local.grammar_mask import Constraint, mask_logits
from rosd_fast.engines.local.kv_cache import BLOCK, RowCache
from rosd_fast.engines.local.sampling import Policy, draw, uniforms
from rosd_fast.types import GenerationRequest

PREFILL_TOKENS = 8192  # padded tokens of one prefill pass, which bounds its memory


@dataclass(frozen=True, slots=True)
class RequestSlice:
    """Completions of a request that join the batch together."""

    request: GenerationRequest
    indices: range  # indices of the completions
    limit: int  # maximum number of tokens of each
    constraint: Future[Constraint] | None = None  # at the start of the text; each row has a copy


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished completion."""

    request: GenerationRequest
    index: int
    ids: list[int]  # its tokens
    logprobs: list[float]  # one per token


@dataclass(slots=True)
class DecodeState:
    """The state of B rows. S is one more than the maximum number of tokens of any row."""

    alive: Tensor  # [B] bool, not finished
    last_ids: Tensor  # [B] int64, the token to feed next
    positions: Tensor  # [B] int64, its position ids
    starts: Tensor  # [B] int64, first column of the row in the cache
    counts: Tensor  # [B] int64, tokens taken so far
    limits: Tensor  # [B] int64, maximum number of tokens
    stops: Tensor  # [B] int64, index into the table of stop tokens
    uniforms: Tensor  # [B, S] float32, random numbers of the draws
    ids: Tensor  # [B, S] int64, sampled tokens
    logprobs: Tensor  # [B, S] float32

    def select(self, rows: Tensor) -> DecodeState:
        return DecodeState(*(getattr(self, field.name)[rows] for field in fields(self)))

    def join(self, other: DecodeState) -> DecodeState:
        return DecodeState(
            *(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )


class DecodeBatch:
    """Decodes up to `max_rows` rows over one KV cache. Use it within `NextToken.running`.

    cache: keys and values of the rows.
    state: tensors of the rows; None until the first ones join.
    owners: the request slice and completion index of each row.
    constraints: the grammar state of each row; None: no grammar.
    num_alive: number of unfinished rows.
    stop_sets: the distinct sets of stop tokens, each with its row in `stop_table`.
    stop_table: [K, V] bool, the tokens in each of K stop sets.
    """

    def __init__(
        self,
        model: NextToken,
        slices: Sequence[RequestSlice],
        *,
        max_rows: int,
        pad_token_id: int,
    ) -> None:
        self.model = model
        self.device = model.model.device
        self.max_rows = max_rows
        self.pad_token_id = pad_token_id
        self.slots = 1 + max(item.limit for item in slices)
        longest = max(len(item.request.prompt_ids) for item in slices)
        num_rows = min(max_rows, sum(len(item.indices) for item in slices))
        self.cache = RowCache(rows=num_rows, columns=longest + min(self.slots, BLOCK))
        self.cache.num_rows = 0
        self.state: DecodeState | None = None
        self.owners: list[tuple[RequestSlice, int]] = []
        self.constraints: list[Constraint | None] = []
        self.num_alive = 0
        self._make_stop_table(slices)

    @property
    def num_rows(self) -> int:
        """The number of rows in the batch, including finished ones."""
        return len(self.owners)

    @property
    def num_finished(self) -> int:
        return len(self.owners) - self.num_alive

    @property
    def num_free(self) -> int:
        """The number of rows that may join."""
        return self.max_rows - len(self.owners)

    def admit(self, slices: Sequence[RequestSlice]) -> int:
        """Prefill the prompt of each slice once and add its rows; return the number of new tokens.

        Prompts must not be longer than those of rows that joined before, unless the batch is empty.
        """
        taken = 0
        for part in self._prefill_parts(slices):
            taken += self._admit_part(part)
        self._rows_changed()
        return taken

    def step(self) -> int:
        """Feed each row its last token and draw the next; return the number of new tokens."""
        state = self.state
        assert state is not None
        shift = self.cache.reserve_columns(1)
        if shift or self._mask_width != self.cache.capacity:
            state.starts -= shift
            self._rows_changed()
        logits = self.model.decode(self.cache, state.last_ids, state.positions, self._mask)
        taken = self.num_alive
        state.positions += state.alive  # finished rows keep their position, within the context
        self._take_tokens(state, logits, self._policy, self.constraints)
        self.num_alive = int(state.alive.sum())
        return taken

    def retire(self) -> list[Finished]:
        """Remove the finished rows and return their completions."""
        state = self.state
        assert state is not None
        dead = (~state.alive).nonzero()[:, 0]
        finished = self._collect(state.select(dead), [self.owners[row] for row in dead.tolist()])
        # Live rows from the back fill the holes, so that few rows are copied.
        alive = state.alive.nonzero()[:, 0]
        kept = torch.arange(self.num_alive, device=self.device)
        holes, movers = dead[dead < self.num_alive], alive[alive >= self.num_alive]
        kept[holes] = movers
        self.cache.move_rows(movers, holes)
        self.cache.num_rows = self.num_alive
        self.state = state.select(kept)
        self.owners = [self.owners[row] for row in kept.tolist()]
        self.constraints = [self.constraints[row] for row in kept.tolist()]
        self._rows_changed()
        return finished

    def _make_stop_table(self, slices: Sequence[RequestSlice]) -> None:
        stop_sets = {item.request.params.stop_token_ids for item in slices}
        self.stop_sets = {ids: row for row, ids in enumerate(sorted(stop_sets))}
        table = torch.zeros(len(self.stop_sets), self.model.vocab_size, dtype=torch.bool)
        for ids, row in self.stop_sets.items():
            table[row, [i for i in ids if 0 <= i < self.model.vocab_size]] = True
        self.stop_table = table.to(self.device)

    def _prefill_parts(self, slices: Sequence[RequestSlice]) -> list[list[RequestSlice]]:
        """Split `slices`, in order, into passes of at most PREFILL_TOKENS padded tokens."""
        parts: list[list[RequestSlice]] = []
        width = 0
        for item in slices:
            length = len(item.request.prompt_ids)
            if not parts or max(width, length) * (len(parts[-1]) + 1) > PREFILL_TOKENS:
                parts.append([])
                width = 0
            parts[-1].append(item)
            width = max(width, length)
        return parts

    def _admit_part(self, slices: Sequence[RequestSlice]) -> int:
        lengths = torch.tensor([len(item.request.prompt_ids) for item in slices])
        width = int(lengths.max())
        ids = torch.full((len(slices), width), self.pad_token_id)
        for row, item in enumerate(slices):
            prompt = item.request.prompt_ids
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        prompts = RowCache(rows=len(slices), columns=width)
        starts = (width - lengths).to(self.device)
        logits = self.model.prefill(prompts, ids.to(self.device), starts)

        owners = [(item, index) for item in slices for index in item.indices]
        prompt_of = torch.tensor([row for row, item in enumerate(slices) for _ in item.indices])
        prompt_of = prompt_of.to(self.device)
        self.cache.append_rows(prompts, prompt_of)
        state = self._new_state(owners, starts[prompt_of] + self.cache.end - width)
        constraints = [
            None if item.constraint is None else item.constraint.result().copy()
            for item, _ in owners
        ]
        self._take_tokens(state, logits[prompt_of], self._policy_of(owners), constraints)
        self.state = state if self.state is None else self.state.join(state)
        self.owners += owners
        self.constraints += constraints
        return len(owners)

    def _new_state(self, owners: Sequence[tuple[RequestSlice, int]], starts: Tensor) -> DecodeState:
        """The state of rows that have no token yet and begin at the columns `starts` [B]."""
        num, slots = len(owners), self.slots
        noise = torch.zeros(num, slots)
        for row, (item, index) in enumerate(owners):
            request = item.request
            numbers = uniforms(
                seed=request.seed, request_id=request.id, index=index, count=item.limit
            )
            noise[row, : item.limit] = torch.from_numpy(numbers)
        columns = torch.tensor(
            [
                (
                    len(item.request.prompt_ids),
                    item.limit,
                    self.stop_sets[item.request.params.stop_token_ids],
                )
                for item, _ in owners
            ]
        ).to(self.device)
        return DecodeState(
            alive=torch.ones(num, dtype=torch.bool, device=self.device),
            last_ids=columns.new_zeros(num),
            positions=columns[:, 0].clone(),  # those of the first sampled tokens
            starts=starts,
            counts=columns.new_zeros(num),
            limits=columns[:, 1].clone(),
            stops=columns[:, 2].clone(),
            uniforms=noise.to(self.device),
            ids=columns.new_zeros(num, slots),
            logprobs=torch.zeros(num, slots, device=self.device),
        )

    def _take_tokens(
        self,
        state: DecodeState,
        logits: Tensor,
        policy: Policy,
        constraints: Sequence[Constraint | None],
    ) -> None:
        """Draw a token for each row. That of a finished row goes to the slot behind its tokens."""
        active: list[Constraint | None] = []  # without those of finished rows
        if any(constraint is not None for constraint in constraints):
            alive = state.alive.tolist()
            active = [c if a else None for c, a in zip(constraints, alive, strict=True)]
            logits = mask_logits(logits, active)
        slot = state.counts[:, None]
        ids, logprobs = draw(logits, state.uniforms.gather(1, slot)[:, 0], policy)
        for constraint, token in zip(active, ids.tolist() if active else (), strict=True):
            if constraint is not None:
                constraint.take(token)
        state.ids.scatter_(1, slot, ids[:, None])
        state.logprobs.scatter_(1, slot, logprobs[:, None])
        state.last_ids = ids
        state.counts += state.alive
        state.alive &= ~self.stop_table[state.stops, ids] & (state.counts < state.limits)

    def _policy_of(self, owners: Sequence[tuple[RequestSlice, int]]) -> Policy:
        params = [item.request.params for item, _ in owners]
        return Policy.of(params, vocab=self.model.vocab_size, device=self.device)

    def _rows_changed(self) -> None:
        """Recompute what depends on the set of rows and on their first columns."""
        state = self.state
        assert state is not None
        self.num_alive = int(state.alive.sum())
        if self.owners:
            self.cache.first = int(state.starts.min())
        self._mask = self.model.decode_mask(self.cache, state.starts)
        self._mask_width = self.cache.capacity
        self._policy = self._policy_of(self.owners)

    def _collect(
        self, state: DecodeState, owners: Sequence[tuple[RequestSlice, int]]
    ) -> list[Finished]:
        counts, ids, logprobs = state.counts.tolist(), state.ids.cpu(), state.logprobs.cpu()
        return [
            Finished(
                item.request,
                index,
                ids[row, : counts[row]].tolist(),
                logprobs[row, : counts[row]].tolist(),
            )
            for row, (item, index) in enumerate(owners)
        ]
