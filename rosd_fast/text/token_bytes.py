"""The bytes that each sampled token adds to the decoded text, read from the vocabulary.

Text is never encoded again and prefixes are never decoded: both move token boundaries. Instead the
steps of the tokenizer's own decoder are done on each token by itself, so that the pieces, joined
and decoded with errors="replace", are `tokenizer.decode(ids, skip_special_tokens=True,
clean_up_tokenization_spaces=False)`. Byte-level BPE and sentencepiece with or without byte fallback
are covered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rosd_fast.errors import UserError

Pieces = list[bytes]  # UTF-8, one a token
Step = Callable[[Pieces], Pieces]

BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\ufffd".encode()


class TokenBytes:
    """Bytes of sampled ids. Raises UserError for a tokenizer whose decoder it cannot follow.

    >>> TokenBytes(tokenizer).of(tokenizer.encode("12 apples<|end|>"))
    [b'1', b'2', b' apples', b'']
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} has no tokenizer.json, where a token's bytes are read",
                where="tokenizer",
                fix="Give a model with a fast tokenizer",
            )
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._decode = compile_decoder(json.loads(backend.to_str())["decoder"])

    def of(self, ids: Sequence[int], /) -> list[bytes]:
        """One entry an id; b"" for special tokens and for ids that the vocabulary does not have.

        An entry may be part of a character, and depends on its neighbours where the decoder does:
        the first space of a sentencepiece text is dropped, and byte tokens that are no UTF-8
        together are U+FFFD each.
        """
        names = [self._backend.id_to_token(token) for token in ids]
        shown = {
            place: name.encode()
            for place, name in enumerate(names)
            if name is not None and name not in self._special
        }
        pieces = dict(zip(shown, self._decode(list(shown.values())), strict=True))
        return [pieces.get(place, b"") for place in range(len(names))]


def compile_decoder(spec: dict[str, Any] | None) -> Step:
    """The decoder of a tokenizer.json as a function on the tokens' bytes."""
    if spec is None:
        return space_between
    steps: list[Step] = []
    fused = False  # whether the decoder sees one text by now, rather than tokens
    for part in _parts(spec):
        kind = part["type"]
        if kind == "ByteLevel" and not fused:
            steps.append(ByteLevel())
        elif kind == "ByteFallback" and not fused:
            steps.append(byte_fallback)
        elif kind == "Replace" and "String" in part["pattern"] and not fused:
            steps.append(_replace(part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace" and not fused:
            first = " " if part["prepend_scheme"] == "never" else ""
            steps.append(_replace(part["replacement"], " ", first=first))
        elif kind == "BPEDecoder" and not fused:
            steps.append(_replace(part["suffix"], " ", last=""))
        elif kind == "Strip":
            steps.append(_strip(part["content"], part["start"], part["stop"], whole=fused))
        elif kind != "Fuse":
            raise UserError(
                f"its decoder {kind} cannot be followed token by token",
                where="tokenizer",
                fix="Give a model with a byte-level BPE or sentencepiece tokenizer",
            )
        fused = fused or kind in ("ByteLevel", "Fuse")

    def decode(pieces: Pieces) -> Pieces:
        for step in steps:
            pieces = step(pieces)
        return pieces

    return decode


def _parts(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, nested sequences laid flat."""
    if spec["type"] == "Sequence":
        for part in spec["decoders"]:
            yield from _parts(part)
    else:
        yield spec


class ByteLevel:
    """Each character stands for a byte. A token with any other character is its own UTF-8."""

    def __init__(self) -> None:
        # The alphabet of GPT-2: printable Latin-1 is itself, the other bytes follow from U+0100 on.
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
    """<0xE2> is the byte E2; each token of a run that is no UTF-8 is U+FFFD."""
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
    """Without a decoder, tokens are joined with spaces."""
    return [piece if place == 0 else b" " + piece for place, piece in enumerate(pieces)]


def _replace(old: str, new: str, *, first: str | None = None, last: str | None = None) -> Step:
    """Replace within each token; with something else in the first or the last one."""

    def step(pieces: Pieces) -> Pieces:
        result = [piece.replace(old.encode(), new.encode()) for piece in pieces]
        if pieces and first is not None:
            result[0] = pieces[0].replace(old.encode(), first.encode())
        if pieces and last is not None:
            result[-1] = pieces[-1].replace(old.encode(), last.encode())
        return result

    return step


def _strip(content: str, start: int, stop: int, *, whole: bool) -> Step:
    """Drop up to `start` leading and `stop` trailing copies of a character."""
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
