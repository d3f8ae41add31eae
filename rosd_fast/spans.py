"""From a quote to the tokens that are distilled.

The quote is looked up in the bytes of the sampled ids (`TokenBytes`), so the tokens found are those
that were sampled: with leading-space tokens the quote "wrong" starts inside the token " wrong",
which is taken in.

Granularity `sentence` is the whole sentence, or sentences, that hold the quote. A sentence ends
after a `.`, `!` or `?` that is followed by whitespace or the end of the text, and before a newline;
3.5 ends none. The whitespace between sentences belongs to neither.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from rosd_fast.token_bytes import REPLACEMENT, TokenBytes
from rosd_fast.types import ErrorSpan

if TYPE_CHECKING:
    from rosd_fast.config import SpanConfig
    from rosd_fast.types import Group, Reflection, Rollout, Verdict

__all__ = ["LocatedSpans", "QuoteMatch", "TokenBytes", "locate_errors", "locate_quote"]

SENTENCE_END = re.compile(rb"[.!?](?=\s|\Z)|\n")
WHITESPACE = b" \t\n\r\f\v"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteMatch:
    """Where a quote stands: the fewest tokens that hold all of it, and its whole sentences."""

    start: int  # tokens [start, end)
    end: int
    sentence_start: int  # tokens [sentence_start, sentence_end), never less than [start, end)
    sentence_end: int
    ambiguous: bool  # the quote stands in the text more than once; this is the first time


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedSpans:
    """The spans of a step by rollout id, and how the quotes fared.

    num_quotes counts wrong rollouts with an explanation, each of which should have a quote; it is
    num_found + num_missed. num_ambiguous counts those found more than once.
    """

    spans: dict[str, ErrorSpan]
    num_quotes: int
    num_found: int
    num_ambiguous: int
    num_missed: int
    start_fracs: tuple[
        float, ...
    ]  # of each quote found: its first token / tokens of the completion

    def metrics(self) -> dict[str, float]:
        """The `reflect/*` metrics of locating; those that nothing can be said of are absent."""
        lengths = [span.end - span.start for span in self.spans.values()]
        metrics = {}
        if self.num_quotes:
            metrics["reflect/found_frac"] = self.num_found / self.num_quotes
        if self.num_found:
            metrics["reflect/ambiguous_frac"] = self.num_ambiguous / self.num_found
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
) -> LocatedSpans:
    """The tokens to distil of each rollout that has an explanation.

    Correct rollouts get the whole completion. Wrong ones get what `config.granularity` makes of
    their quote; a quote that is not in the rollout is left out or gets the whole completion, as
    `config.on_miss` says. Rollouts without a reflection, without an explanation or without tokens
    have no span.
    """
    spans: dict[str, ErrorSpan] = {}
    found: list[tuple[QuoteMatch, Rollout]] = []
    num_quotes = 0
    for rollout, reflection in _explained(groups, reflections):
        match = None
        if not verdicts[rollout.id].success:
            num_quotes += 1
            match = locate_quote(reflection.quote or "", token_bytes.of(rollout.completion_ids))
            if match is not None:
                found.append((match, rollout))
            elif config.on_miss == "skip":
                continue
        spans[rollout.id] = _span(rollout, match, config.granularity)
    return LocatedSpans(
        spans=spans,
        num_quotes=num_quotes,
        num_found=len(found),
        num_ambiguous=sum(match.ambiguous for match, _ in found),
        num_missed=num_quotes - len(found),
        start_fracs=tuple(match.start / len(rollout.completion_ids) for match, rollout in found),
    )


def _explained(
    groups: Sequence[Group], reflections: Mapping[str, Reflection]
) -> Iterator[tuple[Rollout, Reflection]]:
    for group in groups:
        for rollout in group.rollouts:
            reflection = reflections.get(rollout.id)
            if reflection is not None and reflection.explanation and rollout.completion_ids:
                yield rollout, reflection


def _span(rollout: Rollout, match: QuoteMatch | None, granularity: str) -> ErrorSpan:
    length = len(rollout.completion_ids)
    if match is None:
        return ErrorSpan(rollout_id=rollout.id, start=0, end=length, source="full")
    start, end = {
        "suffix": (match.start, length),
        "span": (match.start, match.end),
        "sentence": (match.sentence_start, match.sentence_end),
    }[granularity]
    return ErrorSpan(rollout_id=rollout.id, start=start, end=end, source="quote")


def locate_quote(quote: str, completion_bytes: Sequence[bytes]) -> QuoteMatch | None:
    """The first place of `quote` in a completion, given the bytes of its tokens.

    The quote must be there byte for byte; whitespace around it is dropped when that is what it
    takes. None when it is not there, and for a quote of nothing but whitespace.
    """
    if not quote.strip():
        return None
    text, origins = replace_invalid(b"".join(completion_bytes))
    for wanted in (quote, quote.strip()):
        # UTF-8 is self-synchronizing: bytes are found where characters are. Half a surrogate pair,
        # which a str may hold, is found nowhere.
        needle = wanted.encode(errors="surrogatepass")
        first = text.find(needle)
        if first >= 0:
            break
    else:
        return None
    last = first + len(needle)
    sentence = sentences_around(text, first, last)
    ends = list(accumulate(map(len, completion_bytes)))

    def tokens(first: int, last: int) -> tuple[int, int]:
        if origins is not None:
            first, last = origins[first][0], origins[last - 1][1]
        return bisect_right(ends, first), bisect_right(ends, last - 1) + 1

    (start, end), (sentence_start, sentence_end) = tokens(first, last), tokens(*sentence)
    return QuoteMatch(
        start=start,
        end=end,
        sentence_start=sentence_start,
        sentence_end=sentence_end,
        ambiguous=text.find(needle, first + 1) >= 0,
    )


def replace_invalid(data: bytes) -> tuple[bytes, list[tuple[int, int]] | None]:
    """`data` as valid UTF-8, as a reader of the text sees it: U+FFFD for what is none.

    Also returns, for each byte of the result, which range of `data` it stands for; None: `data` is
    unchanged.
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


def sentences_around(text: bytes, first: int, last: int) -> tuple[int, int]:
    """The byte range of the sentences that hold `text[first:last]`, less whitespace around it."""
    quote = text[first:last]
    inner_first = last - len(quote.lstrip(WHITESPACE))
    inner_last = first + len(quote.rstrip(WHITESPACE))
    start, end = 0, len(text)
    for match in SENTENCE_END.finditer(text):
        if match.end() <= inner_first:
            start = match.end()
        elif match.end() >= inner_last:
            end = match.end() if match[0] != b"\n" else match.start()
            break
    start += len(text[start:]) - len(text[start:].lstrip(WHITESPACE))
    end = len(text[:end].rstrip(WHITESPACE))
    return min(start, first), max(end, last)
