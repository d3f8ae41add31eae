"""The batch of completions that are decoded together: they join, take a token each, and retire.

Completions of one request that have the same tokens so far share a row of the model's input and of
the KV cache. They draw from the same distribution, each with its own random numbers, and where
their tokens part, the row is copied:

    completion 0   7 3 5 .          completion 0   7 3 5 8 .   row 0
    completion 1   7 3 5 .   row 0  completion 1   7 3 5 2 .   row 2, a copy of row 0
    completion 2   7 4 .     row 1  completion 2   7 4 6 .     row 1

The state is a set of tensors whose first dimension is the completion or the row, so that a step
costs a handful of small operations whatever their number. Python handles a completion only when it
joins and when it retires, and a row when it is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from rosd_fast.engines.local.forward import NextToken
from rosd_fast.engines.local.grammar_mask import Constraint, mask_logits
from rosd_fast.engines.local.kv_cache import BLOCK
from rosd_fast.engines.local.sampling import Policy, draw, uniforms
from rosd_fast.model.token_rows import token_rows
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
class Columns:
    """Tensors with one dimension in common, the first."""

    def select(self, places: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[places] for field in fields(self)))

    def join(self, other: Self) -> Self:
        return type(self)(
            *(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )


@dataclass(slots=True)
class Rows(Columns):
    """The state of R rows, each of which has at least one completion."""

    alive: Tensor  # [R] bool, some completion is not finished
    last_ids: Tensor  # [R] int64, the token to feed next
    positions: Tensor  # [R] int64, its position ids
    starts: Tensor  # [R] int64, first column of the row in the cache

    def add_copies(self, source: Tensor, last_ids: Tensor) -> None:
        """Add copies of the rows `source` ([K] int64), which are fed other tokens next."""
        self.alive = torch.cat([self.alive, torch.ones_like(source, dtype=torch.bool)])
        self.last_ids = torch.cat([self.last_ids, last_ids])
        self.positions = torch.cat([self.positions, self.positions[source]])
        self.starts = torch.cat([self.starts, self.starts[source]])


@dataclass(slots=True)
class DecodeState(Columns):
    """The state of B completions. S is one more than the maximum number of tokens of any."""

    alive: Tensor  # [B] bool, not finished
    row: Tensor  # [B] int64, its row
    counts: Tensor  # [B] int64, tokens taken so far
    limits: Tensor  # [B] int64, maximum number of tokens
    stops: Tensor  # [B] int64, index into the table of stop tokens
    uniforms: Tensor  # [B, S] float32, random numbers of the draws
    ids: Tensor  # [B, S] int64, sampled tokens
    logprobs: Tensor  # [B, S] float32


class DecodeBatch:
    """Decodes up to `max_rows` completions over one KV cache. Use it within `NextToken.running`.

    cache: keys and values of the rows.
    state: tensors of the completions; None until the first ones join.
    rows: tensors of the rows.
    owners: the request slice and index of each completion.
    row_owners: the request slice of each row.
    constraints: the grammar state of each row; None: no grammar.
    num_alive: number of unfinished completions.
    stop_sets: the distinct sets of stop tokens, each with its row in `stop_table`.
    stop_table: [K, V] bool, the tokens in each of K stop sets.
    num_tokens: number of first ids that may be sampled; `padding_ids` are the others.
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
        self.cache = model.new_cache(rows=num_rows, columns=longest + min(self.slots, BLOCK))
        self.cache.keep_rows(0)
        self.state: DecodeState | None = None
        self.rows: Rows | None = None
        self.owners: list[tuple[RequestSlice, int]] = []
        self.row_owners: list[RequestSlice] = []
        self.constraints: list[Constraint | None] = []
        self.num_alive = 0
        self._make_stop_table(slices)
        self.num_tokens = token_rows(model.model)
        self.padding_ids = torch.arange(self.num_tokens, model.vocab_size, device=self.device)

    @property
    def num_completions(self) -> int:
        """The number of completions in the batch, including finished ones."""
        return len(self.owners)

    @property
    def num_finished(self) -> int:
        return len(self.owners) - self.num_alive

    @property
    def num_free(self) -> int:
        """The number of completions that may join."""
        return self.max_rows - len(self.owners)

    def admit(self, slices: Sequence[RequestSlice]) -> int:
        """Prefill the prompt of each slice and add its completions; return how many tokens are new.

        Prompts must not be longer than those of rows that joined before, unless the batch is empty.
        """
        taken = 0
        for part in self._prefill_parts(slices):
            taken += self._admit_part(part)
        self._rows_changed()
        return taken

    def step(self) -> int:
        """Feed each row its last token and draw the next ones; return the number of new tokens."""
        state, rows = self.state, self.rows
        assert state is not None and rows is not None
        shift = self.cache.reserve_columns(1)
        if shift or self._mask_width != self.cache.capacity:
            rows.starts -= shift
            self._rows_changed()
        logits = self.model.decode(self.cache, rows.last_ids, rows.positions, self._mask)
        taken = self.num_alive
        rows.positions += rows.alive  # finished rows keep their position, within the context
        source = self._take_tokens(state, rows, logits, self._policy, self.constraints)
        if source.numel():
            self.cache.copy_rows(source)
            self.row_owners += [self.row_owners[row] for row in source.tolist()]
            self._policy = self._policy.with_copies(source)
            if self._mask is not None:
                self._mask = torch.cat([self._mask, self._mask[source]])
        self.num_alive = int(state.alive.sum())
        return taken

    def retire(self) -> list[Finished]:
        """Remove the finished completions, and rows without any other; return them."""
        state, rows = self.state, self.rows
        assert state is not None and rows is not None
        dead, alive = (~state.alive).nonzero()[:, 0], state.alive.nonzero()[:, 0]
        finished = self._collect(state.select(dead), [self.owners[i] for i in dead.tolist()])
        self.state = state.select(alive)
        self.owners = [self.owners[i] for i in alive.tolist()]
        self._remove_rows(self.state, rows)
        self._rows_changed()
        return finished

    def _remove_rows(self, state: DecodeState, rows: Rows) -> None:
        """Remove the rows without an unfinished completion."""
        gone, left = (~rows.alive).nonzero()[:, 0], rows.alive.nonzero()[:, 0]
        # Rows from the back fill the holes, so that few rows are copied.
        kept = torch.arange(left.numel(), device=self.device)
        holes, movers = gone[gone < left.numel()], left[left >= left.numel()]
        kept[holes] = movers
        self.cache.move_rows(movers, holes)
        self.cache.keep_rows(left.numel())
        new_place = torch.zeros_like(rows.last_ids)
        new_place[kept] = torch.arange(left.numel(), device=self.device)
        state.row = new_place[state.row]
        self.rows = rows.select(kept)
        self.row_owners = [self.row_owners[row] for row in kept.tolist()]
        self.constraints = [self.constraints[row] for row in kept.tolist()]

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
        width, unpadded = 0, self.model.way == "exact"
        for item in slices:
            length = len(item.request.prompt_ids)
            if (
                not parts
                or max(width, length) * (len(parts[-1]) + 1) > PREFILL_TOKENS
                or (unpadded and length != width)
            ):
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
        prompts = self.model.new_cache(rows=len(slices), columns=width)
        starts = (width - lengths).to(self.device)
        logits = self.model.prefill(prompts, ids.to(self.device), starts)

        owners = [(item, index) for item in slices for index in item.indices]
        prompt_of = torch.tensor([row for row, item in enumerate(slices) for _ in item.indices])
        state = self._new_state(owners, prompt_of.to(self.device))
        rows = Rows(
            alive=torch.ones_like(starts, dtype=torch.bool),
            last_ids=torch.zeros_like(starts),
            positions=lengths.to(self.device),  # those of the first sampled tokens
            starts=starts,
        )
        constraints = [
            None if item.constraint is None else item.constraint.result().copy() for item in slices
        ]
        source = self._take_tokens(state, rows, logits, self._policy_of(slices), constraints)
        copied = torch.cat([torch.arange(len(slices), device=self.device), source])
        self.cache.append_rows(prompts, copied)
        rows.starts += self.cache.end - width
        state.row += len(self.row_owners)
        self.state = state if self.state is None else self.state.join(state)
        self.rows = rows if self.rows is None else self.rows.join(rows)
        self.owners += owners
        self.row_owners += [slices[row] for row in copied.tolist()]
        self.constraints += constraints
        return len(owners)

    def _new_state(self, owners: Sequence[tuple[RequestSlice, int]], row: Tensor) -> DecodeState:
        """The state of completions that have no token yet, in the rows `row` [B]."""
        num, slots = len(owners), self.slots
        noise = torch.zeros(num, slots)
        for place, (item, index) in enumerate(owners):
            request = item.request
            numbers = uniforms(
                seed=request.seed, request_id=request.id, index=index, count=item.limit
            )
            noise[place, : item.limit] = torch.from_numpy(numbers)
        columns = torch.tensor(
            [(item.limit, self.stop_sets[item.request.params.stop_token_ids]) for item, _ in owners]
        ).to(self.device)
        return DecodeState(
            alive=torch.ones(num, dtype=torch.bool, device=self.device),
            row=row,
            counts=columns.new_zeros(num),
            limits=columns[:, 0].clone(),
            stops=columns[:, 1].clone(),
            uniforms=noise.to(self.device),
            ids=columns.new_zeros(num, slots),
            logprobs=torch.zeros(num, slots, device=self.device),
        )

    def _take_tokens(
        self,
        state: DecodeState,
        rows: Rows,
        logits: Tensor,
        policy: Policy,
        constraints: list[Constraint | None],
    ) -> Tensor:
        """Draw a token for each completion; return the rows of which copies were added, [K] int64.

        The token of a finished completion goes to the slot behind its tokens. logits: [R, V]. The
        copies are in `rows` and `constraints`; the caller copies the cache.
        """
        if self.num_tokens < logits.shape[1]:
            logits = logits.index_fill(1, self.padding_ids, -torch.inf)
        if any(constraint is not None for constraint in constraints):
            alive = rows.alive.tolist()
            active = [c if a else None for c, a in zip(constraints, alive, strict=True)]
            logits = mask_logits(logits, active)
        slot = state.counts[:, None]
        ids, logprobs = self._draw(state, rows, logits, policy)
        state.ids.scatter_(1, slot, ids[:, None])
        state.logprobs.scatter_(1, slot, logprobs[:, None])
        state.counts += state.alive
        state.alive &= ~self.stop_table[state.stops, ids] & (state.counts < state.limits)
        source = self._part(state, rows, ids)
        if any(constraint is not None for constraint in constraints):
            copied = [constraints[row] for row in source.tolist()]
            constraints += [None if c is None else c.copy() for c in copied]
            tokens, alive = rows.last_ids.tolist(), rows.alive.tolist()
            for constraint, token, goes_on in zip(constraints, tokens, alive, strict=True):
                if constraint is not None and goes_on:
                    constraint.take(token)
        else:
            constraints += [None] * source.numel()
        return source

    def _draw(
        self, state: DecodeState, rows: Rows, logits: Tensor, policy: Policy
    ) -> tuple[Tensor, Tensor]:
        """The next token [B] of each completion and its log-probability [B]."""
        uniform, row = state.uniforms.gather(1, state.counts[:, None])[:, 0], state.row
        if rows.alive.numel() < row.numel():
            return draw(logits, uniform, policy, row)
        # Each has a row of its own: in the rows' order, no logits are copied.
        ids, logprobs = draw(logits, torch.empty_like(uniform).scatter_(0, row, uniform), policy)
        return ids[row], logprobs[row]

    def _part(self, state: DecodeState, rows: Rows, ids: Tensor) -> Tensor:
        """Give each row the token of its first unfinished completion to feed next, and completions
        with other tokens copies of the row; return the rows that were copied, [K] int64.

        ids: [B], the last tokens.
        """
        num, num_rows = ids.numel(), rows.alive.numel()
        place = torch.arange(num, device=self.device).masked_fill_(~state.alive, num)
        first = place.new_full((num_rows,), num).scatter_reduce_(0, state.row, place, "amin")
        rows.alive = first < num
        fed = ids[first.clamp_(max=num - 1)]
        rows.last_ids = torch.where(rows.alive, fed, rows.last_ids)
        if num_rows == num:
            return ids[:0]
        parted = (state.alive & (ids != rows.last_ids[state.row])).nonzero()[:, 0]
        vocab = self.model.vocab_size
        key = state.row[parted] * vocab + ids[parted]
        pairs, index = key.unique(return_inverse=True)
        state.row[parted] = num_rows + index
        rows.add_copies(pairs // vocab, pairs % vocab)
        return pairs // vocab

    def _policy_of(self, owners: Sequence[RequestSlice]) -> Policy:
        params = [item.request.params for item in owners]
        return Policy.of(params, vocab=self.model.vocab_size, device=self.device)

    def _rows_changed(self) -> None:
        """Recompute what depends on the set of rows and on their first columns."""
        state, rows = self.state, self.rows
        assert state is not None and rows is not None
        self.num_alive = int(state.alive.sum())
        if self.owners:
            self.cache.first = int(rows.starts.min())
        self._mask = self.model.decode_mask(self.cache, rows.starts)
        self._mask_width = self.cache.capacity
        self._policy = self._policy_of(self.row_owners)

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
