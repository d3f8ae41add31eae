"""A real language model on real problems: SmolLM2-135M, two steps in small numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train

SCIENCE = Path(__file__).parents[3] / "shared" / "data" / "sciknoweval-biology" / "train.json"
EASY = {
    "What is the capital of France?": "Paris",
    "Which animal barks, a cat or a dog?": "dog",
    "What colour is a clear sky on a sunny day?": "blue",
    "How many legs does a spider have? Write the number as a word.": "eight",
}

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not SCIENCE.is_file(), reason=f"needs {SCIENCE.name} of SciKnowEval biology")
def test_two_steps_on_science_problems_end_well(tmp_path: Path) -> None:
    """The model rarely solves these: a step without a right rollout must end well too."""
    options = {"out": str(tmp_path), "name": "science", "data.train": str(SCIENCE)}
    run = train(apply_args(load_preset("smollm2"), options))
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["rollout/num_rollouts"] == 8 for row in rows[1:])
    assert (run / "checkpoints" / "step_000002" / "model.safetensors").is_file()
    lines = (run / "rollouts" / "step_000002.jsonl").read_text().splitlines()
    assert {json.loads(line)["problem"]["domain"] for line in lines} == {"sciknoweval-biology"}


def test_a_step_on_problems_it_can_solve(tmp_path: Path) -> None:
    data = tmp_path / "easy.jsonl"
    rows = [{"prompt": p, "answer": a, "verifier": "contains"} for p, a in EASY.items()]
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {
        "out": str(tmp_path),
        "name": "easy",
        "data.train": str(data),
        "steps": 1,
        "sample.problems_per_step": 4,
        "sample.max_new_tokens": 48,
        "reflect.max_new_tokens": 64,
    }
    run = train(apply_args(load_preset("smollm2"), options))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["rollout/accuracy"] > 0
    # Whether a reflection finds the error differs with the machine's rounding.
    assert (row["loss/grad_norm"] > 0) == (row["loss/num_distilled_tokens"] > 0)
