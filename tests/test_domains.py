"""The paper's five domains and an AIME-shaped file, as published: two steps, then an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.cli import main
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.data.problems import load_problems
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from rosd_fast.verify import VERIFIERS
from tests.teacher_folder import save_teacher

DATA = Path(__file__).parents[2] / "shared" / "data"
SCIENCE = "SciKnowEval: multiple choice, domain is the folder"
TOOLS = "tool use: answer is a list of Action and Action_Input"
AIME = [
    {
        "id": i,
        "problem": f"Find the number of positive divisors of $2^{{{i}}} \\cdot 3^{{{i}}}$.",
        "solution": f"It is $({i}+1)^2$, which is \\boxed{{{(i + 1) ** 2}}}.",
        "answer": str((i + 1) ** 2),
        "url": "https://example.org",
        "year": "2024",
    }
    for i in range(10, 30)
]
# file, as what its rows are read, verifier, domain, number of problems
DOMAINS = [
    ("sciknoweval-chemistry/train.json", SCIENCE, "choice", "sciknoweval-chemistry", 1890),
    ("sciknoweval-biology/train.json", SCIENCE, "choice", "sciknoweval-biology", 450),
    ("sciknoweval-material/train.json", SCIENCE, "choice", "sciknoweval-material", 841),
    ("tooluse/test.json", TOOLS, "tools", "tooluse", 68),
    ("aime/2024.jsonl", "AIME: whole numbers from 0 to 999", "math", "aime", len(AIME)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the quickstart's tokenizer and room for the prompts of tool use."""
    folder = tmp_path_factory.mktemp("model") / "long"
    return save_teacher(folder, num_hidden_layers=1, max_position_embeddings=8192)


def source(name: str, folder: Path) -> str:
    """The path of a domain's file; AIME's is written to `folder`."""
    if name.startswith("aime/"):
        path = folder / name
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in AIME))
        return str(path)
    if not (DATA / name).is_file():
        pytest.skip(f"needs {name}")
    return str(DATA / name)


def two_steps(preset: str, data: str, out: Path, **changes: Any) -> list[dict[str, float]]:
    """The metrics of a run of two steps, for which a quarter of the problems is held out."""
    options: dict[str, Any] = {
        "data.train": data,
        "data.dev": "25%",
        "data.dev_ood": None,
        "steps": 2,
        "out": str(out),
        "name": "run",
        "sample.problems_per_step": 2,
        "sample.group_size": 2,
        "sample.max_new_tokens": 16,
        "reflect.max_new_tokens": 32,
        "eval.problems": 2,
        "eval.samples": 1,
        "checkpoint.every": 0,
    }
    run = train(apply_args(load_preset(preset), options | changes))
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.parametrize(("name", "says", "verifier", "domain", "number"), DOMAINS)
def test_two_steps_and_an_evaluation(
    name: str,
    says: str,
    verifier: str,
    domain: str,
    number: int,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = source(name, tmp_path)
    problems = load_problems(data)
    assert [shape.says for _, shape, _ in problems.recognized] == [says]
    assert len(problems) == number and {p.verifier for p in problems[:20]} == {verifier}
    score, perfect = VERIFIERS[verifier], VERIFIERS[verifier].perfect
    assert all(score(perfect(p.answer), p.answer).score == 1 for p in problems)
    other = next(p for p in problems if p.answer != problems[0].answer)
    assert score(perfect(problems[0].answer), other.answer).score == 0

    # Nothing that a random model writes is right: reflections start from the right answer.
    changes: dict[str, Any] = {"model": model, "sample.max_prompt_tokens": 6000}
    changes |= {"reflect.max_prompt_tokens": 7000, "teacher.max_prompt_tokens": 7000}
    changes |= {"select.on_no_success": "answer", "select.stop_after_steps": 0}
    rows = two_steps("quickstart", data, tmp_path, **changes)
    assert f"read as {says}" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["rollout/answer_found_frac"] <= 1 for row in rows[1:])
    assert all(row["verify/died"] == row["verify/failed"] == 0 for row in rows[1:])
    assert all(math.isfinite(row[f"eval/dev/{domain}"]) for row in (rows[0], rows[2]))
    (line, *_) = (tmp_path / "run" / "rollouts" / "step_000002.jsonl").read_text().splitlines()
    assert json.loads(line)["problem"]["domain"] == domain

    command = ["eval", model, "--data", data, "--problems", "2", "--samples", "2"]
    assert main([*command, "--max-new-tokens", "16", "--out", str(tmp_path / "evals")]) == 0
    (folder,) = (tmp_path / "evals").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["total"]["num_problems"] == 2
    assert [*result["data"][Path(data).stem]["domains"]] == [domain]
    completions = (folder / "completions.jsonl").read_text().splitlines()
    assert len(completions) == 4
    for completion in map(json.loads, completions):
        assert completion["domain"] == domain
        assert completion["success"] or completion["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sciknoweval-chemistry/train.json", "tooluse/test.json"])
def test_a_real_language_model(name: str, tmp_path: Path) -> None:
    data = source(name, tmp_path)
    changes = {"sample.max_prompt_tokens": 2000, "data.dev": None}
    rows = two_steps("smollm2", data, tmp_path, **changes)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["rollout/num_rollouts"] == 4 for row in rows[1:])
