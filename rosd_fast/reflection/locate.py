"""From a quote to the tokens that are distilled.

Quotes are matched against the bytes of the sampled token ids (`TokenBytes`), byte by byte; text is
never re-tokenized. The quote "wrong" may start inside the token " wrong", which then belongs to the
match. If a quote is missed and `on_miss` is fuzzy, two more matches are tried:

    normalized    under Unicode's NFKC, in lower case, with runs of whitespace as one space
    fuzzy         the most similar passage of that text (rapidfuzz), if it is similar enough

If a quote occurs several times, `occurrence` chooses the first, the last or none. The outcomes are
counted. A reflection that gives the number of a sentence needs no search.

Granularity `suffix` is everything from the quote to the end of the completion, its stop token
included; `span` is the quote; `sentence` is the whole sentences that contain it (see `sentences`).

A rollout that thinks is searched after its thinking, and its spans begin there: a quote that occurs
in thinking alone counts as missed. A rollout of which the reflector saw only the end is searched in
that end.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from rosd_fast.reflection.reencode import reencoded_start
from rosd_fast.text.sentences import sentences
from rosd_fast.text.token_bytes import REPLACEMENT
from rosd_fast.types import ErrorSpan

if TYPE_CHECKING:
    from rosd_fast.config import SpanConfig
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import Group, Reflection, Rollout, Verdict

WHITESPACE = b" \t\n\r\f\v"
Found = Literal["quote", "normalized", "fuzzy"]
Origins = list[tuple[int, int]]  # for each unit of a text, the range of its source text


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Where a quote is: the fewest tokens that contain it, and its whole sentences."""

    start: int  # tokens [start, end), never empty
    end: int
    sentence_start: int  # tokens [sentence_start, sentence_end), which include [start, end)
    sentence_end: int
    found: Found
    ambiguous: bool  # whether the quote occurs more than once


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedSpans:
    """The spans of a step, and how many quotes were found, and how."""

    spans: dict[str, ErrorSpan]  # by rollout id
    num_quotes: int  # wrong rollouts with an explanation: num_found + num_missed
    num_found: int
    num_ambiguous: int  # that occur several times; with occurrence unique_only they are missed
    num_normalized: int  # found only after normalizing
    num_fuzzy: int  # found only by similarity
    start_fracs: tuple[float, ...]  # per quote found: its first token / tokens of the completion
    num_in_thinking: int | None = None  # missed quotes that occur in thinking; None: none thinks

    @property
    def num_missed(self) -> int:
        return self.num_quotes - self.num_found

    def metrics(self) -> dict[str, float]:
        """The `reflect/*` metrics of locating; a mean over nothing is left out."""
        lengths = [span.end - span.start for span in self.spans.values()]
        metrics = {}
        if self.num_quotes:
            metrics["reflect/found_frac"] = self.num_found / self.num_quotes
            metrics["reflect/ambiguous_frac"] = self.num_ambiguous / self.num_quotes
            inexact = self.num_normalized + self.num_fuzzy
            metrics["reflect/inexact_frac"] = inexact / self.num_quotes
            if self.num_in_thinking is not None:
                metrics["reflect/in_thinking_frac"] = self.num_in_thinking / self.num_quotes
        if self.num_found:
            metrics["reflect/span_start_frac"] = sum(self.start_fracs) / self.num_found
        if lengths:
            metrics["reflect/span_tokens"] = sum(lengths) / len(lengths)
        return metrics


def locate_errors(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    reflections: Mapping[str, Reflection],
    *,
    token_bytes: TokenBytes,
    config: SpanConfig,
    reencode_with: Any = None,
    thinking: Mapping[str, int] | None = None,
) -> LocatedSpans:
    """Find the tokens to distil of each rollout that has an explanation.

    The span of a correct rollout is the whole completion. That of a wrong one follows from its
    quote and `config.granularity`; if the quote is missed, the rollout has no span or the whole
    completion, by `config.on_miss`. A rollout without a reflection, an explanation or tokens has no
    span.

    thinking: by rollout id, the number of first tokens that are thinking, where spans may not fall;
    the whole completion is then what follows. None: spans may fall anywhere.
    reencode_with: a tokenizer, to begin spans where the public code does (`reencode`, a known bug);
    None: at the quote's first token.
    """
    thinking = thinking or {}
    spans: dict[str, ErrorSpan] = {}
    found: list[tuple[Located, Rollout]] = []
    num_quotes = num_ambiguous = num_in_thinking = 0
    for rollout, reflection in _explained(groups, reflections):
        match, first = None, thinking.get(rollout.id, 0)
        if not verdicts[rollout.id].success:
            num_quotes += 1
            if reencode_with is not None:
                match = _locate_reencoded(reflection, rollout, reencode_with)
            else:
                match = _locate_reflection(reflection, rollout, first, token_bytes, config)
                if match is None and first > reflection.shown_from:
                    hidden = _locate_reflection(reflection, rollout, 0, token_bytes, config)
                    num_in_thinking += hidden is not None
            if match is not None and match.ambiguous:
                num_ambiguous += 1
                match = None if config.occurrence == "unique_only" else match
            if match is not None:
                found.append((match, rollout))
            elif config.on_miss != "full":
                continue
        if (first if match is None else match.start) < len(rollout.completion_ids):
            spans[rollout.id] = _span(rollout, match, config.granularity, first)
    return LocatedSpans(
        spans=spans,
        num_quotes=num_quotes,
        num_found=len(found),
        num_ambiguous=num_ambiguous,
        num_normalized=sum(match.found == "normalized" for match, _ in found),
        num_fuzzy=sum(match.found == "fuzzy" for match, _ in found),
        start_fracs=tuple(match.start / len(rollout.completion_ids) for match, rollout in found),
        num_in_thinking=num_in_thinking if thinking else None,
    )


def _explained(
    groups: Sequence[Group], reflections: Mapping[str, Reflection]
) -> Iterator[tuple[Rollout, Reflection]]:
    for group in groups:
        for rollout in group.rollouts:
            reflection = reflections.get(rollout.id)
            if reflection is not None and reflection.explanation and rollout.completion_ids:
                yield rollout, reflection


def _locate_reflection(
    reflection: Reflection,
    rollout: Rollout,
    first: int,
    token_bytes: TokenBytes,
    config: SpanConfig,
) -> Located | None:
    """Where the reflection's quote is, from the rollout's token `first` on; None: missed.

    A sentence is counted in what the reflector saw.
    """
    shown = reflection.shown_from
    start = shown if reflection.sentence is not None else max(shown, first)
    pieces = token_bytes.of(rollout.completion_ids[start:])
    if reflection.sentence is not None:
        match = locate_sentence(reflection.sentence, pieces)
    else:
        match = locate(
            reflection.quote or "",
            pieces,
            occurrence="last" if config.occurrence == "last" else "first",
            min_score=config.min_score if config.on_miss == "fuzzy" else None,
        )
    if match is None or match.start + start < first:
        return None
    return _shifted(match, start, first)


def _shifted(match: Located, by: int, first: int) -> Located:
    """The match as tokens of the whole completion; its sentences begin at `first` at the latest."""
    return replace(
        match,
        start=match.start + by,
        end=match.end + by,
        sentence_start=max(match.sentence_start + by, first),
        sentence_end=match.sentence_end + by,
    )


def _locate_reencoded(reflection: Reflection, rollout: Rollout, tokenizer: Any) -> Located | None:
    """The match of the public code, up to the end of the completion; it may be empty."""
    length = len(rollout.completion_ids)
    start = reencoded_start(tokenizer, rollout.completion_ids, reflection.quote or "")
    if start is None:
        return None
    return Located(
        start=start,
        end=length,
        sentence_start=start,
        sentence_end=length,
        found="quote",
        ambiguous=False,
    )


def _span(rollout: Rollout, match: Located | None, granularity: str, first: int) -> ErrorSpan:
    """The span of a match; without one, the completion from token `first` on."""
    length = len(rollout.completion_ids)
    if match is None:
        return ErrorSpan(rollout_id=rollout.id, start=first, end=length, source="full")
    start, end = {
        "suffix": (match.start, length),
        "span": (match.start, match.end),
        "sentence": (match.sentence_start, match.sentence_end),
    }[granularity]
    return ErrorSpan(
        rollout_id=rollout.id,
        start=start,
        end=end,
        source=match.found,
        error_end=match.sentence_end if granularity == "sentence" else match.end,
    )


def locate(
    quote: str,
    pieces: Sequence[bytes],
    *,
    occurrence: Literal["first", "last"] = "first",
    min_score: float | None = None,
) -> Located | None:
    """Find `quote` in a completion, given the bytes of its tokens (`TokenBytes.of`).

    The match is byte by byte, and if that fails the same without whitespace around the quote.

    min_score: if that fails too, match normalized text, and the most similar passage from this
    similarity on, of 100; None: neither.

    Returns None when the quote is missed or is only whitespace.
    """
    if not quote.strip():
        return None
    text = _Text(pieces)
    for wanted in (quote, quote.strip()):
        # UTF-8 is self-synchronizing, so matching bytes are matching characters. Half a surrogate
        # pair, which a str may contain, never matches.
        needle = wanted.encode(errors="surrogatepass")
        first = text.data.find(needle)
        if first < 0:
            continue
        last = text.data.rfind(needle)
        place = first if occurrence == "first" else last
        return text.located(place, place + len(needle), "quote", ambiguous=first != last)
    return None if min_score is None else _locate_similar(quote, text, occurrence, min_score)


def locate_sentence(number: int, pieces: Sequence[bytes]) -> Located | None:
    """The sentence of that number, counted from 1; None when there are fewer sentences."""
    text = _Text(pieces)
    if not 1 <= number <= len(text.sentences):
        return None
    return text.located(*text.sentences[number - 1], "quote", ambiguous=False)


class _Text:
    """A completion's text as UTF-8 bytes, and the tokens that they belong to."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.data, self.origins = replace_invalid(b"".join(pieces))
        self.ends = list(accumulate(map(len, pieces)))
        self.sentences = sentences(self.data)

    def tokens(self, first: int, last: int) -> tuple[int, int]:
        """The tokens that contain the bytes [first, last) of the text."""
        if self.origins is not None:
            first, last = self.origins[first][0], self.origins[last - 1][1]
        return bisect_right(self.ends, first), bisect_right(self.ends, last - 1) + 1

    def located(self, first: int, last: int, found: Found, *, ambiguous: bool) -> Located:
        (start, end), sentence = self.tokens(first, last), self._sentences_around(first, last)
        sentence_start, sentence_end = self.tokens(*sentence)
        return Located(
            start=start,
            end=end,
            sentence_start=sentence_start,
            sentence_end=sentence_end,
            found=found,
            ambiguous=ambiguous,
        )

    def _sentences_around(self, first: int, last: int) -> tuple[int, int]:
        """The byte range of the sentences that contain [first, last), without outer whitespace."""
        quote = self.data[first:last]
        inner_first = last - len(quote.lstrip(WHITESPACE))
        inner_last = first + len(quote.rstrip(WHITESPACE))
        starts = [start for start, _ in self.sentences]
        start, _ = self.sentences[bisect_right(starts, inner_first) - 1]
        _, end = self.sentences[bisect_right(starts, inner_last - 1) - 1]
        return min(start, first), max(end, last)


def _locate_similar(quote: str, text: _Text, occurrence: str, min_score: float) -> Located | None:
    """Find `quote` in the normalized text, or else the passage most similar to it."""
    shown, origins = normalize(text.data.decode())
    wanted = normalize(quote)[0].strip()
    if not wanted:
        return None

    def located(first: int, last: int, found: Found, ambiguous: bool) -> Located:
        return text.located(origins[first][0], origins[last - 1][1], found, ambiguous=ambiguous)

    first = shown.find(wanted)
    if first >= 0:
        last = shown.rfind(wanted)
        place = first if occurrence == "first" else last
        return located(place, place + len(wanted), "normalized", first != last)

    from rapidfuzz.fuzz import partial_ratio_alignment

    match = partial_ratio_alignment(wanted, shown, score_cutoff=min_score)
    if match is None or not shown[match.dest_start : match.dest_end].strip():
        return None
    return located(match.dest_start, match.dest_end, "fuzzy", False)


def normalize(text: str) -> tuple[str, Origins]:
    """(normalized text, for each of its characters the range of bytes of `text` it came from).

    Normalized text is NFKC, in lower case, with runs of whitespace as one space.
    """
    shown: list[str] = []
    origins: Origins = []
    place = byte = 0
    while place < len(text):
        stop = place + 1  # the end of a character and its combining marks
        while stop < len(text) and unicodedata.combining(text[stop]):
            stop += 1
        cluster = text[place:stop]
        size = len(cluster.encode(errors="surrogatepass"))
        for char in unicodedata.normalize("NFKC", cluster).lower():
            char = " " if char.isspace() else char
            if char == " " and shown and shown[-1] == " ":
                origins[-1] = (origins[-1][0], byte + size)
                continue
            shown.append(char)
            origins.append((byte, byte + size))
        place, byte = stop, byte + size
    return "".join(shown), origins


def replace_invalid(data: bytes) -> tuple[bytes, Origins | None]:
    """`data` as valid UTF-8, with U+FFFD for invalid bytes, as decoding replaces them.

    Also returns, for each byte of the result, the range of `data` it came from; None when `data` is
    valid and unchanged.
    """
    text, origins, place = bytearray(), [], 0
    view = memoryview(data)
    while place < len(data):
        try:
            str(view[place:], "utf-8")
            if place == 0:
                break
            good = bad = len(data)
        except UnicodeDecodeError as error:
            good, bad = place + error.start, place + error.end
        text += data[place:good]
        origins += [(byte, byte + 1) for byte in range(place, good)]
        if bad > good:
            text += REPLACEMENT
            origins += [(good, bad)] * len(REPLACEMENT)
        place = bad
    if place == 0:
        return data, None
    return bytes(text), origins
