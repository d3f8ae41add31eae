"""Answers of a server, read with one list of log-probabilities per completion."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.engines.sglang.answers import read_json

SPELLINGS: list[dict[str, Any]] = [
    {"separators": (",", ":")},
    {},
    {"indent": 1, "ensure_ascii": False},
]
HOSTILE = st.text() | st.just('"output_token_logprobs":[[-1,2,null],[') | st.just("]]")
COMPLETION = st.fixed_dictionaries(
    {
        "text": HOSTILE,
        "output_ids": st.lists(st.integers(0, 10**6)),
        "meta_info": st.fixed_dictionaries(
            {"finish_reason": st.fixed_dictionaries({"type": HOSTILE})},
            optional={
                "output_token_logprobs": st.lists(
                    st.tuples(st.floats(-99, 0), st.integers(0, 10**6), st.none())
                ),
                "input_token_logprobs": st.just([[None, 0, None], [-1.0, 2, None]]),
            },
        ),
    }
)


@given(
    answer=COMPLETION | st.lists(COMPLETION, max_size=4),
    spelling=st.sampled_from(SPELLINGS),
)
def test_the_log_probabilities_are_those_of_json(answer: Any, spelling: dict[str, Any]) -> None:
    data = json.dumps(answer, **spelling).encode(errors="surrogatepass")
    expected = json.loads(json.dumps(answer))
    for item in expected if isinstance(expected, list) else [expected]:
        meta = item["meta_info"]
        if "output_token_logprobs" in meta:
            meta["output_token_logprobs"] = [x for x, *_ in meta["output_token_logprobs"]]
    assert read_json(data) == expected


@pytest.mark.parametrize("value", [{"meta_info": {"input_token_logprobs": [[None, 0]]}}, [], 3])
def test_other_answers_are_json(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value


def test_half_an_answer_is_an_error() -> None:
    item = {"meta_info": {"output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]], "x": 1}}
    data = json.dumps([item, item]).encode()
    for size in range(1, len(data)):
        with pytest.raises(ValueError, match=r"line 1"):
            read_json(data[:size])


def test_what_is_not_finite_is_nan() -> None:
    """SGLang's JSON library writes null for it."""
    data = b'{"meta_info":{"output_token_logprobs":[[null,7,null],[-0.5,8,null]]}}'
    first, second = read_json(data)["meta_info"]["output_token_logprobs"]
    assert math.isnan(first) and second == -0.5
