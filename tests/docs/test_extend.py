"""The examples of docs/extend.md do what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rosd_fast import methods
from rosd_fast.config import DataConfig
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.data.problems import load_problems
from rosd_fast.data.shapes import registry as shapes
from rosd_fast.errors import UserError
from rosd_fast.report import read_rollouts, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, VerifierPool, registry

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


@pytest.fixture(autouse=True)
def without_new_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that a block registers is gone after the test."""
    monkeypatch.setattr(shapes, "_REGISTERED", dict(shapes._REGISTERED))


@pytest.fixture(autouse=True)
def my_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file of the page; what the page registers is gone after the test."""
    file = tmp_path / "my_verifier.py"
    file.write_text(blocks("A verifier")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(VERIFIERS)
    yield file
    sys.modules.pop("my_verifier", None)
    for name in set(VERIFIERS) - before:
        del registry._REGISTERED[name]


def test_every_block_runs() -> None:
    sections = re.findall(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    found = [source for section in sections for source in blocks(section)]
    assert len(found) == PAGE.read_text().count("```python") >= 4
    for source in found:
        run(source)


def yes_no(verifier: str, answer: str = "yes") -> Problem:
    return Problem(id="p", domain="d", prompt="Is 7 prime?", answer=answer, verifier=verifier)


def test_a_file_of_ones_own_is_a_verifier(my_verifier: Path) -> None:
    name = f"{my_verifier}:verify_yes_no"
    with VerifierPool() as pool:
        verifier = pool.open(name)
        texts = ["<answer>True</answer>", "<answer>No.</answer>", "yes", "<answer>so</answer>"]
        judged = pool.judge_sync([(yes_no(name), text) for text in texts])
        checked = pool.check_answers([(name, "no"), (name, "perhaps")])
    assert [j.score for j in judged] == [1.0, 0.0, 0.0, 0.0]
    assert [j.reason for j in judged] == [None, None, "no answer tag", "neither yes nor no"]
    assert [j.score for j in checked] == [1.0, 0.0]
    assert verifier.answers == "yes or no" and not verifier.is_instructed("Is 7 prime?")


def test_a_script_of_ones_own_registers_and_trains(my_verifier: Path) -> None:
    script = my_verifier.with_name("train_yes_no.py")
    script.write_text(blocks("A verifier")[1])
    rows = [{"prompt": f"Is {number} prime?", "answer": "yes"} for number in range(16)]
    data = my_verifier.with_name("primes.jsonl")
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script.name, data.name],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (script.parent / "runs").iterdir()
    rollouts = read_rollouts(rollouts_path(folder, 1))
    assert len(rollouts) == 16 * 8
    (*_, row) = read_metrics(folder / "metrics.jsonl")
    assert row["verify/failed"] == row["verify/died"] == row["verify/timed_out"] == 0


def test_an_answer_that_nothing_can_match_is_refused(tmp_path: Path) -> None:
    run(blocks("A verifier")[1])  # registers yes_no
    row = {"prompt": "Is 7 prime?", "answer": "perhaps", "verifier": "yes_no"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="yes or no"):
        load_problems(str(tmp_path / "data.jsonl"))


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


def test_the_new_shape_is_recognized(tmp_path: Path) -> None:
    run(blocks("A data format")[0])
    row = {"passage": "Cats have four legs.", "question": "do cats have legs", "answer": True}
    path = tmp_path / "boolq.jsonl"
    path.write_text(f"{json.dumps(row)}\n")
    problems = load_problems(str(path), data=DataConfig(answer_instruction="off"))
    assert problems.recognized[0][1].says == "BoolQ: a question about a passage, yes or no"
    assert problems[0].prompt == "Cats have four legs.\n\ndo cats have legs? Answer yes or no."
    assert (problems[0].answer, problems[0].verifier) == ("yes", "exact")
    path.write_text("".join(f"{json.dumps(r)}\n" for r in [row, row, {**row, "answer": "yes"}]))
    with pytest.raises(UserError, match=r'boolq\.jsonl:3: the field "answer" is a JSON string'):
        load_problems(str(path))
