"""The rows that are decoded side by side: they join, take a token each, and retire.

Everything a row has is a tensor with the rows in front, so that a step costs a handful of small
operations whatever the number of rows; Python sees a row only when it joins and when it retires.
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

PREFILL_TOKENS = 8192  # padded tokens of one prefill pass: bounds its memory


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of a request that join together: completions `indices`, of at most `limit` tokens."""

    request: GenerationRequest
    indices: range
    limit: int
    constraint: Future[Constraint] | None = None  # at the start of the text; each row has a copy


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion that is done: its tokens and their log-probabilities."""

    request: GenerationRequest
    index: int
    ids: list[int]
    logprobs: list[float]


@dataclass(slots=True)
class Rows:
    """State of B rows; S is one more than the most tokens any row may take."""

    alive: Tensor  # [B] bool
    last_ids: Tensor  # [B] int64, the token to feed next
    positions: Tensor  # [B] int64, its position id
    starts: Tensor  # [B] int64, the first column of the row in the cache
    counts: Tensor  # [B] int64, tokens taken so far
    limits: Tensor  # [B] int64
    stops: Tensor  # [B] int64, row of the table of stop tokens
    uniforms: Tensor  # [B, S] float32
    ids: Tensor  # [B, S] int64
    logprobs: Tensor  # [B, S] float32

    def take(self, rows: Tensor) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def join(self, other: Rows) -> Rows:
        return Rows(
            *(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )


class DecodeBatch:
    """At most `max_rows` rows over one cache. Use it within `NextToken.running`.

    `stop_table` [K, V] bool tells for each distinct set of stop tokens, `stop_sets`, what is in it.
    """

    def __init__(
        self, model: NextToken, shares: Sequence[Share], *, max_rows: int, pad_token_id: int
    ) -> None:
        self.model = model
        self.device = model.model.device
        self.max_rows = max_rows
        self.pad_token_id = pad_token_id
        self.slots = 1 + max(share.limit for share in shares)
        longest = max(len(share.request.prompt_ids) for share in shares)
        num_rows = min(max_rows, sum(len(share.indices) for share in shares))
        self.cache = RowCache(rows=num_rows, columns=longest + min(self.slots, BLOCK))
        self.cache.num_rows = 0
        self.rows: Rows | None = None
        self.owners: list[tuple[Share, int]] = []  # of each row: its share and completion index
        self.constraints: list[Constraint | None] = []  # of each row
        self.num_alive = 0
        self._make_stop_table(shares)

    @property
    def num_rows(self) -> int:
        """Rows in the batch, finished ones among them."""
        return len(self.owners)

    @property
    def num_finished(self) -> int:
        return len(self.owners) - self.num_alive

    @property
    def num_free(self) -> int:
        """Rows that may join."""
        return self.max_rows - len(self.owners)

    def admit(self, shares: Sequence[Share]) -> int:
        """Prefill each share's prompt once and let its rows join; returns the tokens taken.

        Prompts may not be longer than those of rows that joined before, unless the batch is empty.
        """
        taken = 0
        for part in self._prefill_parts(shares):
            taken += self._admit_part(part)
        self._rows_changed()
        return taken

    def step(self) -> int:
        """Feed each row its last token and draw the next one; returns the tokens taken."""
        rows = self.rows
        assert rows is not None
        shift = self.cache.release_memory(1)
        if shift or self._mask_width != self.cache.capacity:
            rows.starts -= shift
            self._rows_changed()
        logits = self.model.decode(self.cache, rows.last_ids, rows.positions, self._mask)
        taken = self.num_alive
        rows.positions += rows.alive  # finished rows stay where they are, within the context
        self._take_tokens(rows, logits, self._policy, self.constraints)
        self.num_alive = int(rows.alive.sum())
        return taken

    def retire(self) -> list[Finished]:
        """Remove the finished rows and return what they hold."""
        rows = self.rows
        assert rows is not None
        dead = (~rows.alive).nonzero()[:, 0]
        finished = self._collect(rows.take(dead), [self.owners[row] for row in dead.tolist()])
        # Live rows from the back fill the holes, so that few rows are copied.
        alive = rows.alive.nonzero()[:, 0]
        order = torch.arange(self.num_alive, device=self.device)
        holes, movers = dead[dead < self.num_alive], alive[alive >= self.num_alive]
        order[holes] = movers
        self.cache.move_rows(movers, holes)
        self.cache.num_rows = self.num_alive
        self.rows = rows.take(order)
        self.owners = [self.owners[row] for row in order.tolist()]
        self.constraints = [self.constraints[row] for row in order.tolist()]
        self._rows_changed()
        return finished

    def _make_stop_table(self, shares: Sequence[Share]) -> None:
        stop_sets = {share.request.params.stop_token_ids for share in shares}
        self.stop_sets = {ids: row for row, ids in enumerate(sorted(stop_sets))}
        table = torch.zeros(len(self.stop_sets), self.model.vocab_size, dtype=torch.bool)
        for ids, row in self.stop_sets.items():
            table[row, [i for i in ids if 0 <= i < self.model.vocab_size]] = True
        self.stop_table = table.to(self.device)

    def _prefill_parts(self, shares: Sequence[Share]) -> list[list[Share]]:
        """Consecutive shares, so many that a pass has at most PREFILL_TOKENS padded tokens."""
        parts: list[list[Share]] = []
        width = 0
        for share in shares:
            length = len(share.request.prompt_ids)
            if not parts or max(width, length) * (len(parts[-1]) + 1) > PREFILL_TOKENS:
                parts.append([])
                width = 0
            parts[-1].append(share)
            width = max(width, length)
        return parts

    def _admit_part(self, shares: Sequence[Share]) -> int:
        lengths = torch.tensor([len(share.request.prompt_ids) for share in shares])
        width = int(lengths.max())
        ids = torch.full((len(shares), width), self.pad_token_id)
        for row, share in enumerate(shares):
            prompt = share.request.prompt_ids
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        prompts = RowCache(rows=len(shares), columns=width)
        starts = (width - lengths).to(self.device)
        logits = self.model.prefill(prompts, ids.to(self.device), starts)

        owners = [(share, index) for share in shares for index in share.indices]
        share_of = torch.tensor([row for row, s in enumerate(shares) for _ in s.indices])
        share_of = share_of.to(self.device)
        self.cache.append_rows(prompts, share_of)
        rows = self._new_rows(owners, starts[share_of] + self.cache.end - width)
        constraints = [
            None if share.constraint is None else share.constraint.result().copy()
            for share, _ in owners
        ]
        self._take_tokens(rows, logits[share_of], self._policy_of(owners), constraints)
        self.rows = rows if self.rows is None else self.rows.join(rows)
        self.owners += owners
        self.constraints += constraints
        return len(owners)

    def _new_rows(self, owners: Sequence[tuple[Share, int]], starts: Tensor) -> Rows:
        num, slots = len(owners), self.slots
        noise = torch.zeros(num, slots)
        for row, (share, index) in enumerate(owners):
            request = share.request
            numbers = uniforms(
                seed=request.seed, request_id=request.id, index=index, count=share.limit
            )
            noise[row, : share.limit] = torch.from_numpy(numbers)
        columns = torch.tensor(
            [
                (
                    len(share.request.prompt_ids),
                    share.limit,
                    self.stop_sets[share.request.params.stop_token_ids],
                )
                for share, _ in owners
            ]
        ).to(self.device)
        return Rows(
            alive=torch.ones(num, dtype=torch.bool, device=self.device),
            last_ids=columns.new_zeros(num),
            positions=columns[:, 0].clone(),  # of the first sampled token, when it is fed
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
        rows: Rows,
        logits: Tensor,
        policy: Policy,
        constraints: Sequence[Constraint | None],
    ) -> None:
        """Draw a token for each row; a finished row's goes to the slot behind its tokens."""
        bound: list[Constraint | None] = []
        if any(constraint is not None for constraint in constraints):
            alive = rows.alive.tolist()
            bound = [c if a else None for c, a in zip(constraints, alive, strict=True)]
            logits = mask_logits(logits, bound)
        slot = rows.counts[:, None]
        ids, logprobs = draw(logits, rows.uniforms.gather(1, slot)[:, 0], policy)
        for constraint, token in zip(bound, ids.tolist() if bound else (), strict=True):
            if constraint is not None:
                constraint.take(token)
        rows.ids.scatter_(1, slot, ids[:, None])
        rows.logprobs.scatter_(1, slot, logprobs[:, None])
        rows.last_ids = ids
        rows.counts += rows.alive
        rows.alive &= ~self.stop_table[rows.stops, ids] & (rows.counts < rows.limits)

    def _policy_of(self, owners: Sequence[tuple[Share, int]]) -> Policy:
        params = [share.request.params for share, _ in owners]
        return Policy.of(params, vocab=self.model.vocab_size, device=self.device)

    def _rows_changed(self) -> None:
        """Make what depends on which rows there are, and where they begin."""
        rows = self.rows
        assert rows is not None
        self.num_alive = int(rows.alive.sum())
        if self.owners:
            self.cache.first = int(rows.starts.min())
        self._mask = self.model.decode_mask(self.cache, rows.starts)
        self._mask_width = self.cache.capacity
        self._policy = self._policy_of(self.owners)

    def _collect(self, rows: Rows, owners: Sequence[tuple[Share, int]]) -> list[Finished]:
        counts, ids, logprobs = rows.counts.tolist(), rows.ids.cpu(), rows.logprobs.cpu()
        return [
            Finished(
                share.request,
                index,
                ids[row, : counts[row]].tolist(),
                logprobs[row, : counts[row]].tolist(),
            )
            for row, (share, index) in enumerate(owners)
        ]
