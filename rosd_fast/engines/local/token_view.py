"""What llguidance is told of a tokenizer: the bytes of each token id.

llguidance reads byte-level BPE and sentencepiece with byte fallback by itself. Of any other
tokenizer that decodes token by token it gets the bytes that `TokenBytes` knows. Some decoders treat
the first token of a text differently, for example drop its space. Such a token has a second id
behind the vocabulary, an alias, which stands for its bytes at the beginning of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rosd_fast.errors import UserError
from rosd_fast.text.thinking import THINK
from rosd_fast.text.token_bytes import TokenBytes

# Otherwise llguidance allows only one way to tokenize a text that the grammar forces. It knows no
# aliases, and not how the tokenizer itself splits a text.
NO_FORCING = '%llguidance {"no_forcing": true}\n'

NO_TEXT = b"\xff"  # the byte is in no text, and marks special tokens in llguidance


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """A tokenizer as llguidance sees it.

    reader: llguidance's LLTokenizer.
    num_bits: the number of its ids.
    first: [V] int64, the id that stands for each token at the beginning of a text; None: its own.
    silent: tokens that have no bytes at the beginning of a text, but have some inside.
    special: tokens that never have bytes, after which a text still begins.
    prefix: the text that each grammar begins with.
    stops: tokens that are allowed where no other fits; without any, that is an error.
    """

    reader: Any
    num_bits: int
    first: np.ndarray | None = None
    silent: frozenset[int] = frozenset()
    special: frozenset[int] = frozenset()
    prefix: str = ""
    stops: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The attributes and the call that llguidance asks of a tokenizer of another library."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        """Never needed: see `NO_FORCING`."""
        raise NotImplementedError


def token_view(tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]) -> TokenView:
    """The view of a fast tokenizer of transformers. Raises UserError for one that has none.

    vocab_size: number of token ids. stop_token_ids: those that end a text.
    """
    known = TokenBytes(tokenizer)
    try:
        return own_view(tokenizer, known, vocab_size, stop_token_ids)
    except Exception:  # errors of its Rust code have no common type
        return byte_view(tokenizer, known, vocab_size, stop_token_ids)


def own_view(
    tokenizer: Any, known: TokenBytes, vocab_size: int, stop_token_ids: Sequence[int]
) -> TokenView:
    """The view that llguidance has by itself. Raises an error of its own where it has none, and
    ValueError where it takes a token for another text than the decoder does."""
    from llguidance.hf import from_tokenizer

    reader = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(stop_token_ids) or None)
    added = set(tokenizer.get_added_vocab().values())
    for token, piece in known.vocabulary().items():
        if token in added or piece.startswith(NO_TEXT):
            continue
        if (other := reader.decode_bytes([token])) != piece:
            raise ValueError(f"it takes token {token}, {piece!r}, for {other!r}")
    return TokenView(reader=reader, num_bits=vocab_size)


def byte_view(
    tokenizer: Any, known: TokenBytes, vocab_size: int, stop_token_ids: Sequence[int]
) -> TokenView:
    """The view that is made of the bytes of each token. Raises UserError for WordPiece."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if known.kind == "WordPiece":
        raise UserError(
            "grammars cannot follow WordPiece, where only the next token tells where a word ends",
            where="tokenizer",
            fix="Set reflect.mode to free, which needs no grammar",
        )
    begins = known.vocabulary(first=True)
    inside = known.vocabulary()
    if known.kind is None:  # a space between tokens; as the end of a token it ends a word at once
        inside = begins = {token: piece + b" " for token, piece in begins.items()}
    inside = {token: b"" if NO_TEXT in piece else piece for token, piece in inside.items()}
    without_text = frozenset(range(vocab_size)) - inside.keys()
    # A grammar can name a token by its content only if it is special.
    added = tokenizer.get_added_vocab()
    tags = {added[tag] for tag in (THINK.opening, THINK.closing) if tag in added}
    special = without_text | tags | set(stop_token_ids)
    names = {token: name.encode() for name, token in added.items()}
    tokens = [names.get(at, b"") if at in special else inside[at] for at in range(vocab_size)]
    first = np.arange(vocab_size)
    for token in sorted(inside):
        if begins[token] != inside[token]:
            # All stop tokens have an alias, used or not, so that views differ in no shape.
            first[token] = token if token in special else len(tokens)
            tokens.append(begins[token])
    listed = list(stop_token_ids) or [tokenizer.eos_token_id]
    vocabulary = Vocabulary(
        tokens=tokens, special_token_ids=sorted(special), eos_token_id=listed[0]
    )
    return TokenView(
        reader=LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=len(tokens), eos_token=listed),
        num_bits=len(tokens),
        first=first if len(tokens) > vocab_size else None,
        silent=frozenset(at for at, piece in begins.items() if inside[at] and not piece) - special,
        special=without_text,
        prefix=NO_FORCING,
        stops=tuple(listed),
    )


def check_served(tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
    """Raise UserError unless llguidance reads the tokenizer by itself, as it does on a server."""
    try:
        own_view(tokenizer, TokenBytes(tokenizer), len(tokenizer), stop_token_ids)
    except Exception as error:  # errors of its Rust code have no common type
        raise UserError(
            f"llguidance, which a server uses, cannot read it ({str(error).splitlines()[0]})",
            where="tokenizer",
            fix="Set engine.kind to local",
        ) from error
