"""Diagnostics that follow from a step's records alone; docs/diagnostics.md explains each metric."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosd_fast.types import ErrorSpan, TrainSample

NUM_POSITIONS = 10
TENTHS = range(NUM_POSITIONS + 1)
POSITIONS = tuple(f"diag/divergence_pos_{index}" for index in range(NUM_POSITIONS))
"""Mean divergence in each tenth of the rollout, the first tenth first."""


def position_metrics(
    samples: Sequence[TrainSample], per_token: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Return `POSITIONS`: the mean divergence by where in its rollout a token is.

    per_token: by rollout id, the divergence of each distilled token. A tenth without distilled
    tokens is absent.
    """
    bins: list[list[float]] = [[] for _ in POSITIONS]
    for sample in samples:
        if not sample.is_distilled:
            continue
        length, values = len(sample.completion_ids), per_token.get(sample.rollout_id, ())
        # Of the trained range, the place after the last token of each tenth.
        ends = [-(-length * tenth // NUM_POSITIONS) - sample.start for tenth in TENTHS]
        for found, (first, end) in zip(bins, pairwise(max(0, end) for end in ends), strict=True):
            found += values[first:end]
    return {name: _mean(values) for name, values in zip(POSITIONS, bins, strict=True) if values}


def located_errors(spans: Mapping[str, ErrorSpan]) -> set[str]:
    """Return the ids of the rollouts with a located error that tokens precede."""
    return {id_ for id_, span in spans.items() if span.error_end is not None and span.start > 0}


def span_metrics(
    spans: Mapping[str, ErrorSpan],
    per_token: Mapping[str, Sequence[float]],
    *,
    before: float | None = None,
) -> dict[str, float]:
    """Return the mean divergence at located errors, and how it compares with the tokens around.

        diag/divergence_error   in the quoted error
        diag/divergence_after   in the rest of the trained range
        diag/span_contrast      in the quoted error / before it

    Only rollouts of `located_errors` count, so that all are means over the same rollouts.

    before: `diag/divergence_before`; None: there is no contrast.
    """
    errors: list[float] = []
    after: list[float] = []
    for rollout_id in located_errors(spans):
        span, values = spans[rollout_id], per_token.get(rollout_id, ())
        assert span.error_end is not None
        length = span.error_end - span.start
        errors += values[:length]
        after += values[length:]
    metrics = {}
    if errors:
        metrics["diag/divergence_error"] = _mean(errors)
        if before is not None and before > 0:
            metrics["diag/span_contrast"] = _mean(errors) / before
    if after:
        metrics["diag/divergence_after"] = _mean(after)
    return metrics


def token_metrics(
    samples: Sequence[TrainSample],
    *,
    special_ids: Collection[int],
    num_thinking: Callable[[str], int],
) -> dict[str, float]:
    """Return the shares of the trained tokens that say nothing about a solution's steps.

        diag/special_frac    special and added tokens, such as the stop token
        diag/thinking_frac   tokens of thinking, tags included

    The tokens are the distilled ones, or all trained ones in a step without any.

    num_thinking: a rollout id -> its number of first tokens that are thinking.
    """
    counted = [sample for sample in samples if sample.is_distilled] or samples
    total = sum(sample.num_tokens for sample in counted)
    if not total:
        return {}
    special = thinking = 0
    for sample in counted:
        trained = sample.completion_ids[sample.start : sample.end]
        special += sum(map(special_ids.__contains__, trained))
        end = min(sample.end, num_thinking(sample.rollout_id))
        thinking += max(0, end - sample.start)
    return {"diag/special_frac": special / total, "diag/thinking_frac": thinking / total}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
