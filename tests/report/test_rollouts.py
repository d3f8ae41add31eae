"""rollouts/step_*.jsonl has all results of each rollout, whatever its text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rosd_fast.errors import UserError
from rosd_fast.report import read_rollouts, rollouts_path, write_rollouts
from rosd_fast.report.rollouts import token_texts, write_skipped
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import ErrorSpan, Group, Problem, Reflection, Rollout, TrainSample, Verdict


def byte_tokens() -> TokenBytes:
    """Return the bytes of a tokenizer with one token per byte, whose id is the byte."""
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=names, merges=[], byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    return TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def make_group(problem_id: str, texts: list[str], *, prompt: str = "1 + 1 = ?") -> Group:
    problem = Problem(id=problem_id, domain="sums", prompt=prompt, answer="2", verifier="number")
    rollouts = tuple(
        Rollout(
            id=f"{problem_id}/{i}",
            problem_id=problem_id,
            prompt_ids=(1,),
            completion_ids=tuple(text.encode()),
            logprobs=(-0.5,) * len(text.encode()),
            text=text,
            finish_reason="stop",
            policy_version=3,
        )
        for i, text in enumerate(texts)
    )
    return Group(problem=problem, rollouts=rollouts)


def make_step() -> dict[str, Any]:
    """Return a kept group with a correct and a wrong rollout, and a dropped group."""
    groups = [make_group("p1", ["it is 2", "it is é 3"]), make_group("p2", ["what?"])]
    verdicts = {
        "p1/0": Verdict(rollout_id="p1/0", score=1.0, success=True, answer="2"),
        "p1/1": Verdict(rollout_id="p1/1", score=0.25, success=False, answer="3"),
        "p2/0": Verdict(rollout_id="p2/0", score=0.0, success=False, answer=None),
    }
    reflection = Reflection(
        rollout_id="p1/1",
        demonstration_id="p1/0",
        correct=False,
        text="<error_quote>é 3</error_quote><explanation>count</explanation>",
        quote="é 3",
        explanation="count",
        well_formed=True,
        num_tokens=12,
    )
    return {
        "step": 4,
        "groups": groups,
        "verdicts": verdicts,
        "reflections": {"p1/1": reflection},
        "spans": {"p1/1": ErrorSpan(rollout_id="p1/1", start=6, end=10, source="quote")},
        "per_token": {"p1/1": [0.123456789, 0.0, math.nan, 2.0]},
    }


def test_each_rollout_is_one_line_with_all_results(tmp_path: Path) -> None:
    path = write_rollouts(rollouts_path(tmp_path, 4), **make_step(), token_bytes=byte_tokens())
    assert path == tmp_path / "rollouts" / "step_000004.jsonl"
    right, wrong, dropped = read_rollouts(path)
    assert wrong == {
        "step": 4,
        "problem": {
            "id": "p1",
            "domain": "sums",
            "system": None,
            "prompt": "1 + 1 = ?",
            "answer": "2",
        },
        "rollout_id": "p1/1",
        "completion": "it is é 3",
        "completion_ids": list("it is é 3".encode()),
        "score": 0.25,
        "success": False,
        "extracted_answer": "3",
        "finish_reason": "stop",
        "policy_version": 3,
        "tokens": ["i", "t", " ", "i", "s", " ", "", "é", " ", "3"],
        "group_dropped": False,
        "reflection": {
            "mode": "free",
            "demonstration_id": "p1/0",
            "text": "<error_quote>é 3</error_quote><explanation>count</explanation>",
            "quote": "é 3",
            "sentence": None,
            "explanation": "count",
            "refused": None,
            "well_formed": True,
            "num_tokens": 12,
        },
        "span": {"start": 6, "end": 10, "source": "quote", "text": "é 3"},
        "divergence": [0.123457, 0.0, None, 2.0],
    }
    assert right["success"]
    assert (right["reflection"], right["span"], right["divergence"]) == (None, None, None)
    assert [row["group_dropped"] for row in (right, wrong, dropped)] == [False, False, True]


def test_kept_groups_decide_what_is_dropped(tmp_path: Path) -> None:
    step = make_step()
    path = write_rollouts(tmp_path / "a.jsonl", **step, kept=[step["groups"][1]])
    assert [row["group_dropped"] for row in read_rollouts(path)] == [True, True, False]


def test_without_token_bytes_there_are_no_token_texts(tmp_path: Path) -> None:
    row = read_rollouts(write_rollouts(tmp_path / "a.jsonl", **make_step()))[1]
    assert "tokens" not in row
    assert row["span"]["text"] is None


def test_tokens_whose_loss_needs_no_teacher(tmp_path: Path) -> None:
    step = make_step()
    fields: dict[str, Any] = {"problem_id": "p1", "student_prompt_ids": (1,), "start": 0}
    samples = []
    for index, (text, advantage) in enumerate((("it is 2", 0.8660254), ("it is é 3", None))):
        ids = tuple(text.encode())
        samples.append(
            TrainSample(
                rollout_id=f"p1/{index}",
                completion_ids=ids,
                logprobs=(-0.5,) * len(ids),
                end=2 + index,
                advantage=advantage,
                **fields,
            )
        )
    distilled = replace(samples[1], teacher_prompt_ids=(1,), start=6, end=10)
    path = write_rollouts(
        tmp_path / "a.jsonl",
        **step,
        samples=[*samples, distilled],
        logprobs={"p1/1": [-0.123456789, -math.inf, -2.0]},
    )
    right, wrong, dropped = read_rollouts(path)
    assert right["policy"] == {"start": 0, "end": 2, "advantage": 0.866025, "logprob": None}
    assert wrong["policy"]["advantage"] is None
    assert wrong["policy"]["logprob"] == [-0.123457, None, -2.0]
    assert wrong["divergence"] is not None
    assert "policy" not in dropped


def test_a_rollout_is_one_line_whatever_its_text(tmp_path: Path) -> None:
    text = 'a\nb\u2028c\x85"\\ \ud800'  # line ends of Unicode, and half a surrogate pair
    step = make_step()
    step["groups"] = [make_group("p1", ["x", "y"], prompt=text)]
    step["spans"], step["per_token"] = {}, {}
    path = write_rollouts(tmp_path / "a.jsonl", **step)
    assert path.read_bytes().count(b"\n") == 2
    assert read_rollouts(path)[0]["problem"]["prompt"] == text


def test_divergences_must_fit_the_span(tmp_path: Path) -> None:
    step = make_step()
    step["per_token"] = {"p1/1": [0.1]}
    with pytest.raises(AssertionError, match="1 divergences"):
        write_rollouts(tmp_path / "a.jsonl", **step)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "a.jsonl", **make_step())
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:50]}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not JSON"):
        read_rollouts(path)
    path.write_text(json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "span"}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: has no span"):
        read_rollouts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_rollouts(tmp_path / "none.jsonl")


def test_the_samples_of_a_skipped_step_can_be_read_back(tmp_path: Path) -> None:
    samples = [
        TrainSample(
            rollout_id=f"p1/{i}",
            problem_id="p1",
            student_prompt_ids=(1, 2),
            teacher_prompt_ids=(1, 3, 2),
            completion_ids=(4, 5, 6),
            logprobs=(-0.5, -math.inf, -0.25),
            start=1,
            end=3,
            reflection_cut=False,
        )
        for i in range(2)
    ]
    path = write_skipped(tmp_path, 12, samples)
    assert path == tmp_path / "skipped" / "step_000012.jsonl"
    rows: list[Any] = [json.loads(line) for line in path.read_text().splitlines()]
    lists = {k for k, value in asdict(samples[0]).items() if isinstance(value, tuple)}
    fields: list[dict[str, Any]] = [
        {k: tuple(v) if k in lists else v for k, v in row.items()} for row in rows
    ]
    assert samples == [TrainSample(**own) for own in fields]


@given(st.text(max_size=12), st.lists(st.integers(0, 48), max_size=6))
def test_token_texts_join_to_the_text_at_any_boundaries(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "replace")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[low:high] for low, high in pairwise(edges)]
    texts = token_texts(pieces)
    assert len(texts) == len(pieces)
    assert "".join(texts) == data.decode()


def test_token_texts_of_invalid_utf8() -> None:
    assert token_texts([b"a\xe2\x82", b"\xac", b"\xff", b"b\xe2"]) == [
        "a",
        "€",
        "\ufffd",
        "b\ufffd",
    ]
    assert token_texts([]) == []


def test_with_a_real_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    step = make_step()
    text = "naïve 日本 🙂: 2"
    ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    old = step["groups"][0].rollouts[0]
    rollout = replace(old, completion_ids=ids, logprobs=(0.0,) * len(ids), text=text)
    step["groups"] = [replace(step["groups"][0], rollouts=(rollout,))]
    step["spans"] = {"p1/0": ErrorSpan(rollout_id="p1/0", start=0, end=len(ids), source="full")}
    step["per_token"] = {"p1/0": [0.5] * len(ids)}
    path = write_rollouts(tmp_path / "a.jsonl", **step, token_bytes=TokenBytes(tokenizer))
    (row,) = read_rollouts(path)
    assert len(row["tokens"]) == len(row["divergence"]) == len(ids)
    assert "".join(row["tokens"]) == row["span"]["text"] == text
