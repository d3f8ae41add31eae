"""The examples of docs/extend.md do what the page says."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rosd_fast import methods, verify
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.data import rows
from rosd_fast.data.problems import load_problems
from rosd_fast.errors import UserError
from rosd_fast.report import read_rollouts, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from rosd_fast.types import Group, Rollout
from rosd_fast.verify import registry

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
BLOCK = re.compile(r"^([ ]*)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(section: str) -> list[str]:
    """The Python blocks of a section of the page, in order."""
    text = re.split(rf"^## {re.escape(section)}$", PAGE.read_text(), flags=re.MULTILINE)[1]
    text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    return [textwrap.dedent(body) for _, body in BLOCK.findall(text)]


def run(source: str) -> dict[str, Any]:
    """The names that a block defines; its assertions hold or raise."""
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


def test_every_block_runs() -> None:
    sections = re.findall(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    found = [source for section in sections for source in blocks(section)]
    assert len(found) == PAGE.read_text().count("```python") >= 4
    for source in found:
        run(source)


@pytest.fixture
def with_yes_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 of the page; the verifier is gone after the test."""
    monkeypatch.setitem(registry._REGISTERED, "yes_no", verify.VERIFIERS["exact"])
    del registry._REGISTERED["yes_no"]
    function = run(blocks("A verifier")[0])["verify_yes_no"]
    verify.register_verifier("yes_no", function, answers="yes or no")


def write_row(path: Path, **fields: str) -> str:
    path.write_text(json.dumps({"prompt": "Is 7 prime?", "verifier": "yes_no", **fields}) + "\n")
    return str(path)


@pytest.mark.usefixtures("with_yes_no")
def test_a_data_set_can_name_the_new_verifier(tmp_path: Path) -> None:
    (problem,) = load_problems(write_row(tmp_path / "data.jsonl", answer="yes"))
    rollout = Rollout(
        id=f"{problem.id}/0",
        problem_id=problem.id,
        prompt_ids=(1,),
        completion_ids=(2,),
        logprobs=(0.0,),
        text="<answer>Yes</answer>",
        finish_reason="stop",
        policy_version=0,
    )
    verdict = verify.verify_all([Group(problem=problem, rollouts=(rollout,))], threshold=1.0)[
        rollout.id
    ]
    assert verdict.success and verdict.answer == "Yes"


@pytest.mark.usefixtures("with_yes_no")
def test_an_answer_that_nothing_can_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="yes or no"):
        load_problems(write_row(tmp_path / "data.jsonl", answer="perhaps"))


def test_the_new_method_trains_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods._REGISTERED, "sibling", methods.Rosd)
    del methods._REGISTERED["sibling"]
    methods.register_method("sibling", run(blocks("A method")[0])["Sibling"])
    options = {
        "method": "sibling",
        "steps": 1,
        "out": str(tmp_path),
        "name": "run",
        "sample.problems_per_step": 4,
        "data.dev": None,
        "data.dev_ood": None,
    }
    folder = train(apply_args(load_preset("quickstart"), options))
    row = read_metrics(folder / "metrics.jsonl")[-1]
    rollouts = [r for r in read_rollouts(rollouts_path(folder, 1)) if r["span"] is not None]
    assert row["sibling/num_samples"] == len(rollouts) > 0
    assert row["loss/num_distilled_tokens"] == sum(len(r["completion_ids"]) for r in rollouts)
    assert row["loss/divergence"] > 0


def test_converted_rows_load(tmp_path: Path) -> None:
    convert = run(blocks("A data format")[0])["from_gsm8k"]
    line = json.dumps({"question": "What is 500 + 734?", "answer": "500 + 734\n#### 1,234"})
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(f"{row}\n" for row in convert([line])))
    (problem,) = load_problems(str(path))
    assert (problem.answer, problem.verifier, problem.domain) == ("1,234", "number", "gsm8k")


def test_csv_rows_become_problems(tmp_path: Path) -> None:
    read = run(blocks("A data format")[1])["read_csv_rows"]
    path = tmp_path / "problems.csv"
    path.write_text('prompt,answer\n"What is\n2 + 3?",5\nWhat is 1 + 1?,two\n')
    (first, second) = read(path)
    options: dict[str, Any] = {"folder": "sums", "verifier": "number"}
    problem = rows.parse_row(first[1], where=first[0], number=1, **options)
    assert problem.prompt == "What is\n2 + 3?" and problem.id == "sums:1"
    with pytest.raises(UserError, match=r"problems\.csv:4"):  # one row of the file has two lines
        rows.parse_row(second[1], where=second[0], number=2, **options)
