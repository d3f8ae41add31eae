"""Groups without a correct rollout, and correct rollouts without a correct sibling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import Config
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.errors import UserError
from rosd_fast.methods.budgets import check_references
from rosd_fast.methods.rosd import Rosd
from rosd_fast.methods.sdpo import Sdpo
from rosd_fast.report.metrics import read_metrics
from rosd_fast.report.progress import Hidden
from rosd_fast.rollout.select import select_groups
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.train import train
from rosd_fast.types import Generation, GenerationRequest, Problem


@dataclass(frozen=True)
class Model:
    tokenizer: Any

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,)


def method_of(kind: Any, tokenizer: Any, **changes: Any) -> Any:
    given = {
        "teacher.solution_template": "{problem}\n{demonstration}",
        "teacher.wrong_template": "{problem}\n{demonstration}\n{explanation}",
        "reflect.mode": "free",
    }
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    config = apply_args(Config(), given | named)
    chats = make_chats(config.chat, tokenizer)
    return kind(config, Model(tokenizer), TokenBytes(tokenizer), chats)


def taught(tokenizer: Any, method: Any, made: Any, annotations: Any = None) -> dict[str, str]:
    """The second line of each teacher prompt, by rollout."""
    group, verdicts = made
    kept = select_groups([group], verdicts, method.config.select).kept
    built = method.build(kept, verdicts, annotations or {}, Hidden())
    missing = built.metrics.get("select/num_no_demonstration", 0)
    if isinstance(method, Sdpo):
        assert missing + len(built.samples) == sum(len(group.rollouts) for group in kept)
    return {
        sample.rollout_id: tokenizer.decode(sample.teacher_prompt_ids)
        .removesuffix("<|end|><|assistant|>")
        .split("\n")[1]
        for sample in built.samples
    }


def test_sdpo(tokenizer, make_group):
    texts = ["two", "4", "three"]
    made = make_group(texts, [0.0, 1.0, 0.0], reference="2 + 2 = 4")
    wrong = {"p0/0": "4", "p0/2": "4"}
    assert taught(tokenizer, method_of(Sdpo, tokenizer), made) == wrong
    own = method_of(Sdpo, tokenizer, select__on_lone_success="own")
    assert taught(tokenizer, own, made) == wrong | {"p0/1": "4"}
    reference = method_of(Sdpo, tokenizer, select__on_lone_success="reference")
    assert taught(tokenizer, reference, made) == wrong | {"p0/1": "2 + 2 = 4"}
    bare = make_group(texts, [0.0, 1.0, 0.0])
    assert taught(tokenizer, reference, bare) == wrong
    hopeless = make_group(texts, [0.0, 0.0, 0.0], reference="2 + 2 = 4")
    assert taught(tokenizer, reference, hopeless) == {}
    rescued = method_of(Sdpo, tokenizer, select__on_no_success="reference")
    assert taught(tokenizer, rescued, hopeless) == {f"p0/{i}": "2 + 2 = 4" for i in range(3)}
    assert taught(tokenizer, rescued, make_group(texts, [0.0] * 3)) == {}


class Reflector:
    """Writes the same reflection on everything, and keeps what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        text = "<error_quote>is 5</error_quote><explanation>Count.</explanation>"
        self.ids = tuple(tokenizer.encode(text))
        self.asked: list[str] = []
        self.tokenizer = tokenizer

    async def generate(
        self, requests: Sequence[GenerationRequest], *, on_tokens: Any = None
    ) -> list[Generation]:
        self.asked += [self.tokenizer.decode(request.prompt_ids) for request in requests]
        return [
            Generation(
                request_id=request.id,
                index=0,
                completion_ids=self.ids,
                logprobs=(-1.0,) * len(self.ids),
                finish_reason="stop",
                policy_version=0,
            )
            for request in requests
        ]


@dataclass
class Engines:
    student: Reflector
    teacher: None = None


def test_rosd_reflects_and_teaches_from_the_reference(tokenizer, make_group):
    hopeless = make_group(["It is 5.", "So it is 5."], [0.0, 0.0], reference="2 + 2 = 4")
    method = method_of(Rosd, tokenizer, select__on_no_success="reference")
    engines = Engines(Reflector(tokenizer))
    group, verdicts = hopeless
    annotations = asyncio.run(method.annotate(1, [group], verdicts, engines, Hidden()))
    assert len(engines.student.asked) == 2
    assert all("2 + 2 = 4" in prompt for prompt in engines.student.asked)
    assert {a.demonstration_id for a in annotations.values()} == {"reference"}
    found = taught(tokenizer, method, hopeless, annotations)
    assert found == {"p0/0": "2 + 2 = 4", "p0/1": "2 + 2 = 4"}


def test_reference_solutions_must_exist() -> None:
    problems = [
        Problem(id=name, domain="d", prompt="?", answer="4", verifier="number") for name in "ab"
    ]
    for option in ("on_no_success", "on_lone_success"):
        config = apply_args(load_preset("quickstart"), {f"select.{option}": "reference"})
        with pytest.raises(UserError, match=rf"select\.{option}: reference: no problem has"):
            check_references(config, problems)
    check_references(apply_args(config, {"select.on_lone_success": "own"}), problems)
    given = Problem(
        id="c", domain="d", prompt="?", answer="4", verifier="number", reference="2 + 2"
    )
    check_references(config, [*problems, given])


def test_sdpo_has_nobody_to_tell_the_answer() -> None:
    config = apply_args(Config(), {"method": "sdpo", "select.on_no_success": "answer"})
    with pytest.raises(UserError, match=r"select\.on_no_success: answer: the method sdpo"):
        Sdpo.check_options(config)


@pytest.mark.parametrize("policy", ["reference", "answer"])
def test_a_run_learns_from_hopeless_problems(policy: str, tmp_path: Path) -> None:
    """No completion can be right; half of the problems have a reference solution."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"What is {i} + 5?", "answer": "-12345", "verifier": "number"}
        | ({"reference": f"{i} + 5 = {i + 5}."} if i % 2 else {})
        for i in range(4)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {
        "steps": 1,
        "out": str(tmp_path),
        "name": "run",
        "sample.problems_per_step": 4,
        "sample.group_size": 2,
        "data.train": str(data),
        "select.on_no_success": policy,
    }
    run = train(apply_args(load_preset("quickstart"), options))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["rollout/accuracy"] == 0 and row["loss/num_distilled_tokens"] > 0
    rescued = {"reference": 2, "answer": 4}[policy]
    assert row["select/num_rescued"] == rescued
    assert row["select/num_dropped_no_reference"] == 4 - rescued
