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

from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.types import GenerationRequest

MAX_THREADS = 8


class GrammarCompiler:
    """Compiles grammars of requests to `Constraint`s, for one tokenizer.

    tokenizer: a fast tokenizer of transformers.
    vocab_size: width of the logits.

    Its methods raise UserError for a tokenizer that llguidance cannot read.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.num_bits = max(vocab_size, len(tokenizer))
        self._readers: dict[tuple[int, ...], Any] = {}  # keyed by stop token ids

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
                self._reader(key[1])  # created here, since two threads would create it twice
                compiled[key] = pool.submit(self.constraint, *key, where=f"request {request.id}")
            futures.append(compiled[key])
        pool.shutdown(wait=False)  # submitted grammars are still compiled
        return futures

    def constraint(self, grammar: str, stop_token_ids: Sequence[int], *, where: str) -> Constraint:
        """Return a new constraint at the start of the text.

        Raises ValueError for an invalid grammar; `where` names it in the message.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._reader(tuple(stop_token_ids)), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(
                f"{where}: the grammar is wrong: {matcher.get_error().splitlines()[0]}"
            )
        return Constraint(matcher, self.num_bits, where)

    def check(self, stop_token_ids: Sequence[int]) -> None:
        """Raise UserError now if llguidance cannot read the tokenizer."""
        self.constraint('start: "a"', stop_token_ids, where="check")

    def _reader(self, stop_token_ids: tuple[int, ...]) -> Any:
        if stop_token_ids not in self._readers:
            from llguidance.hf import from_tokenizer

            try:
                self._readers[stop_token_ids] = from_tokenizer(
                    self.tokenizer,
                    n_vocab=self.num_bits,
                    eos_token=list(stop_token_ids) or None,
                )
            except Exception as error:  # errors of its Rust code have no common type
                raise UserError(
                    f"llguidance cannot read it ({str(error).splitlines()[0]})",
                    where="tokenizer",
                    fix="Set reflect.mode to free, which needs no grammar",
                ) from error
        return self._readers[stop_token_ids]


class Constraint:
    """A row's state in its grammar. When the text is complete, only stop tokens are allowed."""

    def __init__(self, matcher: Any, num_bits: int, where: str) -> None:
        self.matcher, self.num_bits, self.where = matcher, num_bits, where

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.num_bits, self.where)

    def take(self, token: int) -> None:
        """Advance by an allowed token."""
        self.matcher.consume_token(token)


def allowed_tokens(constraints: Sequence[Constraint], vocab_size: int) -> np.ndarray:
    """[B, vocab_size] bool: the allowed next tokens. Raises ValueError when a grammar fails."""
    words = np.zeros((len(constraints), -(-constraints[0].num_bits // 32)), dtype=np.int32)
    targets = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    executor().unsafe_compute_mask_ptr(targets, words.ctypes.data, words.strides[0], len(targets))
    for constraint in constraints:
        if constraint.matcher.is_error():
            error = constraint.matcher.get_error().splitlines()[0]
            raise ValueError(f"{constraint.where}: the grammar failed: {error}")
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=vocab_size)
    return bits.view(bool)


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
