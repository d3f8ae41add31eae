"""The bytes that each sampled token adds to the decoded text, read from the vocabulary.

Re-tokenizing text and decoding prefixes both move token boundaries. So the steps of the tokenizer's
own decoder are applied to each token by itself: the pieces, joined and decoded with
errors="replace", equal `text.decode.decode(tokenizer, ids)`. Byte-level BPE and sentencepiece, with
or without byte fallback, are supported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rosd_fast.errors import UserError

Pieces = list[bytes]  # UTF-8, one per token
Step = Callable[[Pieces], Pieces]

BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\ufffd".encode()
ANCHOR = b"a"  # beside tokens, so that each is decoded as in the middle of a text


class TokenBytes:
    """The bytes of token ids. Raises UserError for a tokenizer with an unsupported decoder.

    >>> TokenBytes(tokenizer).of(tokenizer.encode("12 apples<|end|>"))
    [b'1', b'2', b' apples', b'']
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} has no tokenizer.json, the source of token bytes",
                where="tokenizer",
                fix="Give a model with a fast tokenizer",
            )
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        spec = json.loads(backend.to_str())["decoder"]
        self._has_byte_tokens = "ByteFallback" in json.dumps(spec)
        self._decode = compile_decoder(spec)
        self._known: dict[int, bytes] | None = {} if _is_pointwise(spec) else None
        self.kind = None if spec is None else str(spec["type"])

    def of(self, ids: Sequence[int], /) -> list[bytes]:
        """One entry per id; b"" for a special token and for an id outside the vocabulary.

        An entry may be part of a character. It depends on its neighbours where the decoder does:
        the first space of a sentencepiece text is dropped, and each byte token of an invalid run is
        U+FFFD.
        """
        if (known := self._known) is not None:
            # Looking up what has been decoded is seven times faster than decoding.
            if new := set(ids) - known.keys():
                known |= zip(new, self._pieces([*new]), strict=True)
            return [known[token] for token in ids]
        return self._pieces(ids)

    def num_chars(self, ids: Sequence[int]) -> list[int]:
        """The number of characters of each token; one that tokens share belongs to the first."""
        pieces = self.of(ids)
        if b"".join(pieces).isascii():
            return [*map(len, pieces)]
        return [len(piece) - sum(byte & 0xC0 == 0x80 for byte in piece) for piece in pieces]

    def _pieces(self, ids: Sequence[int]) -> Pieces:
        names = [self._backend.id_to_token(token) for token in ids]
        shown = {
            place: name.encode()
            for place, name in enumerate(names)
            if name is not None and name not in self._special
        }
        pieces = dict(zip(shown, self._decode(list(shown.values())), strict=True))
        return [pieces.get(place, b"") for place in range(len(names))]

    def vocabulary(self, *, first: bool = False) -> dict[int, bytes]:
        """The bytes of each token id inside a text, or with `first` at its beginning.

        A byte token is its byte, also where that is no character. Special tokens are left out.
        """
        names = {
            token: name.encode()
            for name, token in self._backend.get_vocab(with_added_tokens=True).items()
            if name not in self._special
        }
        result = {
            token: bytes([int(byte[1], 16)])
            for token, name in names.items()
            if self._has_byte_tokens and (byte := BYTE_TOKEN.fullmatch(name))
        }
        if first:
            decoded = [self._decode([name, ANCHOR])[0] for name in names.values()]
        else:
            interleaved = [ANCHOR, *(part for name in names.values() for part in (name, ANCHOR))]
            decoded = self._decode(interleaved)[1::2]
        pieces = dict(zip(names, decoded, strict=True))
        partial = [token for token, byte in result.items() if not byte.isascii()]
        return pieces | {token: result[token] for token in (partial if first else result)}


def ends_words(tokenizer: Any) -> bool:
    """Whether a space follows each token, or each that ends a word, up to the last one of a text.

    That is so for tokenizers of whole words without a decoder, and for BPEDecoder.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is None or type(decoder).__name__ == "BPEDecoder"


def compile_decoder(spec: dict[str, Any] | None) -> Step:
    """The decoder of a tokenizer.json as a function on the bytes of tokens."""
    if spec is None:
        return space_between
    steps: list[Step] = []
    fused = False  # whether the decoder has joined the tokens into one text
    for part in _parts(spec):
        kind = part["type"]
        if kind == "ByteLevel" and not fused:
            steps.append(ByteLevel())
        elif kind == "ByteFallback" and not fused:
            steps.append(byte_fallback)
        elif kind == "Replace" and _within_tokens(part["pattern"].get("String", ""), fused):
            steps.append(_replace(part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace" and not fused:
            first = " " if part["prepend_scheme"] == "never" else ""
            steps.append(_replace(part["replacement"], " ", first=first))
        elif kind == "BPEDecoder" and not fused:
            steps.append(_replace(part["suffix"], " ", last=""))
        elif kind == "WordPiece" and not fused:
            steps.append(_word_piece(part["prefix"], cleanup=part["cleanup"]))
        elif kind == "Strip":
            steps.append(_strip(part["content"], part["start"], part["stop"], whole=fused))
        elif kind != "Fuse":
            raise UserError(
                f"its decoder {kind} does not work token by token",
                where="tokenizer",
                fix="Give a model with a byte-level BPE or sentencepiece tokenizer",
            )
        fused = fused or kind in ("ByteLevel", "Fuse")

    def decode(pieces: Pieces) -> Pieces:
        for step in steps:
            pieces = step(pieces)
        return pieces

    return decode


def _is_pointwise(spec: dict[str, Any] | None) -> bool:
    """Whether the bytes of a token depend on no other token."""
    return spec is not None and all(part["type"] in ("ByteLevel", "Fuse") for part in _parts(spec))


def _within_tokens(pattern: str, fused: bool) -> bool:
    """Whether each occurrence of a pattern lies in one token, if tokens are one text (`fused`)."""
    return len(pattern) == 1 if fused else bool(pattern)


def _parts(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, with nested sequences flattened."""
    if spec["type"] == "Sequence":
        for part in spec["decoders"]:
            yield from _parts(part)
    else:
        yield spec


class ByteLevel:
    """Maps each character of the alphabet to a byte; a token with other characters is UTF-8."""

    def __init__(self) -> None:
        # GPT-2's alphabet: printable Latin-1 is itself; the other bytes start at U+0100.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [byte for byte in range(256) if byte not in printable]
        self.byte = {chr(byte): byte for byte in printable}
        self.byte |= {chr(0x100 + place): byte for place, byte in enumerate(rest)}
        self.known: dict[bytes, bytes] = {}

    def __call__(self, pieces: Pieces) -> Pieces:
        return [self.known.get(piece) or self._piece(piece) for piece in pieces]

    def _piece(self, piece: bytes) -> bytes:
        values = [self.byte.get(char) for char in piece.decode()]
        mapped = bytes(value for value in values if value is not None)
        self.known[piece] = mapped if len(mapped) == len(values) else piece
        return self.known[piece]


def byte_fallback(pieces: Pieces) -> Pieces:
    """Replace <0xE2> by the byte E2, and each token of a run that is not UTF-8 by U+FFFD."""
    result: Pieces = []
    for is_byte, members in groupby(pieces, key=lambda piece: bool(BYTE_TOKEN.fullmatch(piece))):
        if not is_byte:
            result += members
            continue
        run = [bytes([int(piece[3:5], 16)]) for piece in members]
        try:
            b"".join(run).decode()
            result += run
        except UnicodeDecodeError:
            result += [REPLACEMENT] * len(run)
    return result


def space_between(pieces: Pieces) -> Pieces:
    """Put a space before each token but the first, as tokenizers without a decoder do."""
    return [piece if place == 0 else b" " + piece for place, piece in enumerate(pieces)]


def _word_piece(prefix: str, *, cleanup: bool) -> Step:
    """Drop the prefix of a word's later tokens, and put a space before any other but the first.

    cleanup: drop the space again before punctuation and short forms.
    """
    shortened = [(" do not", " don't"), (" ' ", "'")]
    shortened += [(f" {mark}", mark) for mark in (*".?!,", "n't", "'m", "'s", "'ve", "'re")]
    pairs = [(old.encode(), new.encode()) for old, new in shortened]

    def one(piece: bytes, *, first: bool) -> bytes:
        if not first:
            continues = piece.startswith(prefix.encode())
            piece = piece[len(prefix.encode()) :] if continues else b" " + piece
        for old, new in pairs if cleanup else ():
            piece = piece.replace(old, new)
        return piece

    return lambda pieces: [one(piece, first=place == 0) for place, piece in enumerate(pieces)]


def _replace(old: str, new: str, *, first: str | None = None, last: str | None = None) -> Step:
    """Replace `old` by `new` in each token, by `first` in the first and `last` in the last one."""

    def step(pieces: Pieces) -> Pieces:
        result = [piece.replace(old.encode(), new.encode()) for piece in pieces]
        if pieces and first is not None:
            result[0] = pieces[0].replace(old.encode(), first.encode())
        if pieces and last is not None:
            result[-1] = pieces[-1].replace(old.encode(), last.encode())
        return result

    return step


def _strip(content: str, start: int, stop: int, *, whole: bool) -> Step:
    """Drop up to `start` leading and `stop` trailing copies of a character, per token or text."""
    char = content.encode()

    def strip_text(pieces: Pieces) -> Pieces:
        text = b"".join(pieces)
        head, tail = 0, len(text)
        while head < start * len(char) and text.startswith(char, head):
            head += len(char)
        while tail - len(char) >= head and tail > len(text) - stop * len(char):
            if not text.endswith(char, 0, tail):
                break
            tail -= len(char)
        result, place = [], 0
        for piece in pieces:
            kept = piece[max(head - place, 0) : max(tail - place, 0)]
            result.append(kept)
            place += len(piece)
        return result

    if whole:
        return strip_text
    return lambda pieces: [strip_text([piece])[0] for piece in pieces]
