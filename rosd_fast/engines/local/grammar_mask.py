"""Grammars that are enforced while sampling: which tokens a row may take next.

llguidance does the parsing. Here its bit masks become a mask of the logits, for those rows of a
batch that have a grammar.
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
    """Makes a `Constraint` of each request's grammar, for one tokenizer.

    tokenizer: of transformers, fast. vocab_size: width of the logits. Raises UserError for a
    tokenizer that llguidance cannot read.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.num_bits = max(vocab_size, len(tokenizer))
        self._readers: dict[tuple[int, ...], Any] = {}  # by the tokens that end a text

    def constraints(self, requests: Sequence[GenerationRequest]) -> list[Future[Constraint] | None]:
        """Of each request that has a grammar; `result()` waits, and raises ValueError for a wrong
        one.

        Equal grammars are compiled once. They are compiled in threads, in the requests' order,
        while the caller goes on: llguidance lets go of Python's lock.
        """
        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
        compiled: dict[tuple[str, tuple[int, ...]], Future[Constraint]] = {}
        found: list[Future[Constraint] | None] = []
        for request in requests:
            if request.grammar is None:
                found.append(None)
                continue
            key = request.grammar, request.params.stop_token_ids
            if key not in compiled:
                self._reader(key[1])  # made here: threads would make it twice
                compiled[key] = pool.submit(self.constraint, *key, where=f"request {request.id}")
            found.append(compiled[key])
        pool.shutdown(wait=False)  # what was submitted is still done
        return found

    def constraint(self, grammar: str, stop_token_ids: Sequence[int], *, where: str) -> Constraint:
        """A new one, at the start of the text. Raises ValueError for a wrong grammar."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._reader(tuple(stop_token_ids)), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(
                f"{where}: the grammar is wrong: {matcher.get_error().splitlines()[0]}"
            )
        return Constraint(matcher, self.num_bits, where)

    def check(self, stop_token_ids: Sequence[int]) -> None:
        """Raise UserError now if grammars cannot be enforced on this tokenizer."""
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
            except Exception as error:  # it raises what its Rust side raises, of no common type
                raise UserError(
                    f"llguidance cannot read it ({str(error).splitlines()[0]})",
                    where="tokenizer",
                    fix="Set reflect.mode to free, which needs no grammar",
                ) from error
        return self._readers[stop_token_ids]


class Constraint:
    """Where a row is in its grammar. Once the text is complete, only stop tokens may follow."""

    def __init__(self, matcher: Any, num_bits: int, where: str) -> None:
        self.matcher, self.num_bits, self.where = matcher, num_bits, where

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.num_bits, self.where)

    def take(self, token: int) -> None:
        """Go on by a token, which was allowed."""
        self.matcher.consume_token(token)


def allowed_tokens(constraints: Sequence[Constraint], vocab_size: int) -> np.ndarray:
    """[B, vocab_size] bool: the tokens that may follow. Raises ValueError where a grammar fails."""
    words = np.zeros((len(constraints), -(-constraints[0].num_bits // 32)), dtype=np.int32)
    rows = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    executor().unsafe_compute_mask_ptr(rows, words.ctypes.data, words.strides[0], len(rows))
    for constraint in constraints:
        if constraint.matcher.is_error():
            error = constraint.matcher.get_error().splitlines()[0]
            raise ValueError(f"{constraint.where}: the grammar failed: {error}")
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=vocab_size)
    return bits.view(bool)


@cache
def executor() -> Any:
    """llguidance's threads."""
    from llguidance import LLExecutor

    return LLExecutor(min(MAX_THREADS, os.cpu_count() or 1))


def mask_logits(logits: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """[B, V] logits with -inf where a row's constraint forbids the token; None: a free row."""
    bound = [(row, c) for row, c in enumerate(constraints) if c is not None]
    if not bound:
        return logits
    allowed = allowed_tokens([constraint for _, constraint in bound], logits.shape[1])
    rows = torch.tensor([row for row, _ in bound], device=logits.device)
    forbidden = ~torch.from_numpy(allowed).to(logits.device)
    return logits.index_copy(0, rows, logits[rows].masked_fill_(forbidden, -torch.inf))
