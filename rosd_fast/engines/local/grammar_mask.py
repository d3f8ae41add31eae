"""Constrained decoding: which tokens the grammar of a row allows next.

llguidance (github.com/guidance-ai/llguidance) does the parsing. This module turns its bit masks
into a mask of the logits, for the rows of a batch that have a grammar.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rosd_fast.engines.local.token_view import TokenView, token_view

if TYPE_CHECKING:
    from rosd_fast.types import GenerationRequest

MAX_THREADS = 8


class GrammarCompiler:
    """Compiles grammars of requests to `Constraint`s, for one tokenizer.

    tokenizer: a fast tokenizer of transformers.
    vocab_size: width of the logits.

    Its methods raise UserError for a tokenizer that has no `token_view`.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = max(vocab_size, len(tokenizer))
        self._views: dict[tuple[int, ...], TokenView] = {}  # keyed by stop token ids

    def constraints(self, requests: Sequence[GenerationRequest]) -> list[Future[Constraint] | None]:
        """Return one future per request, None for a request without a grammar.

        `result()` waits for the compiled grammar and raises ValueError for an invalid one. Equal
        grammars are compiled once. Threads compile them in the order of the requests while the
        caller continues: llguidance releases the GIL.
        """
        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
        compiled: dict[tuple[str, tuple[int, ...]], Future[Constraint]] = {}
        futures: list[Future[Constraint] | None] = []
        for request in requests:
            if request.grammar is None:
                futures.append(None)
                continue
            key = request.grammar, request.params.stop_token_ids
            if key not in compiled:
                self._view(key[1])  # created here, since two threads would create it twice
                compiled[key] = pool.submit(self.constraint, *key, where=f"request {request.id}")
            futures.append(compiled[key])
        pool.shutdown(wait=False)  # submitted grammars are still compiled
        return futures

    def constraint(self, grammar: str, stop_token_ids: Sequence[int], *, where: str) -> Constraint:
        """Return a new constraint at the start of the text.

        Raises ValueError for an invalid grammar; `where` names it in the message.
        """
        from llguidance import LLMatcher

        view = self._view(tuple(stop_token_ids))
        matcher = LLMatcher(view.reader, view.prefix + grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(
                f"{where}: the grammar is wrong: {matcher.get_error().splitlines()[0]}"
            )
        return Constraint(matcher, view, where)

    def check(self, stop_token_ids: Sequence[int]) -> None:
        """Raise UserError now if grammars cannot constrain the tokenizer's tokens."""
        self.constraint('start: "a"', stop_token_ids, where="check")

    def _view(self, stop_token_ids: tuple[int, ...]) -> TokenView:
        if stop_token_ids not in self._views:
            self._views[stop_token_ids] = token_view(
                self.tokenizer, self.vocab_size, stop_token_ids
            )
        return self._views[stop_token_ids]


class Constraint:
    """A row's state in its grammar. When the text is complete, only stop tokens are allowed."""

    def __init__(
        self, matcher: Any, view: TokenView, where: str, *, begins: bool | None = None
    ) -> None:
        self.matcher, self.view, self.where = matcher, view, where
        # Whether the next token begins the text and has other bytes there.
        self.begins = view.first is not None if begins is None else begins

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.view, self.where, begins=self.begins)

    def take(self, token: int) -> None:
        """Advance by an allowed token."""
        if self.begins and self.view.first is not None:
            self.begins = token in self.view.special
            if token in self.view.silent:
                return
            token = int(self.view.first[token])
        self.matcher.consume_token(token)


def allowed_tokens(constraints: Sequence[Constraint], vocab_size: int) -> np.ndarray:
    """[B, vocab_size] bool: the allowed next tokens. Raises ValueError when a grammar fails."""
    num_bits = constraints[0].view.num_bits
    words = np.zeros((len(constraints), -(-num_bits // 32)), dtype=np.int32)
    targets = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    executor().unsafe_compute_mask_ptr(targets, words.ctypes.data, words.strides[0], len(targets))
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=num_bits)
    allowed = bits[:, :vocab_size].view(bool)
    for row, constraint in enumerate(constraints):
        view = constraint.view
        if constraint.begins and view.first is not None:
            allowed[row] = bits[row, view.first[:vocab_size]]
            allowed[row, list(view.silent)] = True
        if constraint.matcher.is_error():
            error = constraint.matcher.get_error().splitlines()[0]
            if not (view.stops and error.startswith("NoExtension")):
                raise ValueError(f"{constraint.where}: the grammar failed: {error}")
            allowed[row] = False
        if view.stops and not allowed[row].any():
            allowed[row, list(view.stops)] = True
    return allowed


@cache
def executor() -> Any:
    """The thread pool of llguidance."""
    from llguidance import LLExecutor

    return LLExecutor(min(MAX_THREADS, os.cpu_count() or 1))


def mask_logits(logits: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """[B, V] logits with -inf where a row's constraint forbids the token; None: no constraint."""
    constrained = [(row, c) for row, c in enumerate(constraints) if c is not None]
    if not constrained:
        return logits
    allowed = allowed_tokens([constraint for _, constraint in constrained], logits.shape[1])
    rows = torch.tensor([row for row, _ in constrained], device=logits.device)
    forbidden = ~torch.from_numpy(allowed).to(logits.device)
    return logits.index_copy(0, rows, logits[rows].masked_fill_(forbidden, -torch.inf))
