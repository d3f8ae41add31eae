"""Each diagnostic is the mean that its name says, over the tokens that it says."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.report.diagnostics import (
    located_errors,
    position_metrics,
    span_metrics,
    token_metrics,
)
from rosd_fast.types import ErrorSpan, TrainSample


def make_sample(rollout_id: str, start: int, end: int, length: int, **fields: Any) -> TrainSample:
    return TrainSample(
        rollout_id=rollout_id,
        problem_id="p",
        student_prompt_ids=(1,),
        completion_ids=tuple(range(100, 100 + length)),
        logprobs=(0.0,) * length,
        start=start,
        end=end,
        **fields,
    )


def make_span(rollout_id: str, start: int, end: int, error_end: int | None) -> ErrorSpan:
    source = "full" if error_end is None else "quote"
    return ErrorSpan(
        rollout_id=rollout_id, start=start, end=end, source=source, error_end=error_end
    )


def test_divergence_by_position() -> None:
    teacher = {"teacher_prompt_ids": (7,)}
    samples = [
        make_sample("a", 0, 10, 10, **teacher),
        make_sample("b", 15, 20, 20, **teacher),  # tokens 15 to 19 of 20
        make_sample("b", 0, 20, 20, advantage=1.0),
    ]
    per_token = {"a": [float(i) for i in range(10)], "b": [10.0, 20.0, 30.0, 40.0, 50.0]}
    expected = {f"diag/divergence_pos_{i}": float(i) for i in range(7)}
    expected |= {
        "diag/divergence_pos_7": (7 + 10) / 2,
        "diag/divergence_pos_8": (8 + 20 + 30) / 3,
        "diag/divergence_pos_9": (9 + 40 + 50) / 3,
    }
    assert position_metrics(samples, per_token) == pytest.approx(expected)
    late = {f"diag/divergence_pos_{i}" for i in (7, 8, 9)}
    assert position_metrics(samples[1:], per_token).keys() == late
    assert position_metrics(samples, {}) == {}  # a skipped step


def test_the_error_is_compared_with_what_is_before_and_after_it() -> None:
    spans = {
        "a": make_span("a", 3, 8, error_end=5),
        "b": make_span("b", 2, 4, error_end=3),
        "whole": make_span("whole", 0, 3, error_end=None),
        "first": make_span("first", 0, 2, error_end=1),  # nothing before it to compare with
        "missed": make_span("missed", 1, 2, error_end=2),  # of a skipped update
    }
    assert located_errors(spans) == {"a", "b", "missed"}
    per_token = {"a": [8.0, 10.0, 1.0, 2.0, 3.0], "b": [3.0, 2.0], "whole": [99.0] * 3}
    per_token["first"] = [50.0, 60.0]
    assert span_metrics(spans, per_token, before=0.5) == {
        "diag/divergence_error": 7.0,
        "diag/divergence_after": 2.0,
        "diag/span_contrast": 14.0,
    }
    alone = {"a": make_span("a", 3, 5, error_end=5)}  # granularity span
    assert span_metrics(alone, {"a": [1.0, 2.0]}) == {"diag/divergence_error": 1.5}
    assert span_metrics(alone, {"a": [1.0, 2.0]}, before=0.0) == {"diag/divergence_error": 1.5}
    assert span_metrics({}, {}, before=0.5) == {}


def test_special_and_thinking_tokens_are_counted_among_the_trained_ones() -> None:
    distilled = make_sample("a", 2, 6, 6, teacher_prompt_ids=(7,))  # tokens 102 to 105
    policy = make_sample("a", 0, 6, 6, advantage=1.0)
    metrics = token_metrics(
        [distilled, policy], special_ids={100, 105}, num_thinking={"a": 3}.__getitem__
    )
    assert metrics == {"diag/special_frac": 0.25, "diag/thinking_frac": 0.25}
    metrics = token_metrics([policy], special_ids={100, 105}, num_thinking=lambda _: 0)
    assert metrics == {"diag/special_frac": pytest.approx(1 / 3), "diag/thinking_frac": 0.0}
    assert token_metrics([], special_ids=(), num_thinking=lambda _: 0) == {}


def test_an_error_lies_within_its_span() -> None:
    with pytest.raises(ValueError, match="outside of the span"):
        make_span("a", 3, 8, error_end=9)
    with pytest.raises(ValueError, match="outside of the span"):
        make_span("a", 3, 8, error_end=3)
