"""Runs whose verifier is a user's file, or code of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.commands.train import read_config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.quickstart.tasks import load_split
from rosd_fast.report import read_rollouts, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train

FILE = """
from rosd_fast.verify.number import verify_number

def score(completion, answer):
    found = verify_number(completion, answer)
    if found.score == 0:
        raise ValueError("it is wrong")
    return found
"""


def write_data(path: Path, **fields: Any) -> None:
    rows = [{"prompt": p.prompt, "answer": p.answer, **fields} for p in load_split("dev")[:8]]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def options(**given: Any) -> Any:
    small = {
        "data.train": "data.jsonl",
        "data.dev": None,
        "data.dev_ood": None,
        "sample.problems_per_step": 4,
        "sample.group_size": 4,
        "out": "runs",
        "name": "run",
    }
    return apply_args(load_preset("quickstart"), small | given)


def test_a_file_verifies_a_run_and_its_failures_cost_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    (tmp_path / "judge.py").write_text(FILE)
    folder = tmp_path / train(options(**{"data.verifier": "judge.py:score", "steps": 1}))
    rollouts = read_rollouts(rollouts_path(folder, 1))
    wrong = [r for r in rollouts if not r["success"]]
    assert 0 < len(wrong) < len(rollouts)
    (row,) = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] == 1]
    assert row["verify/failed"] == len(wrong)
    assert row["verify/timed_out"] == row["verify/died"] == 0
    assert row["loss/num_distilled_tokens"] > 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("the verifier raised ValueError: it is wrong") == 1
    # The file is found again from another folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = train(read_config({"resume": str(folder), "steps": 2}), resume=folder)
    assert [row["step"] for row in read_metrics(Path(resumed) / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap: apt-get install bubblewrap"
)
def test_a_run_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's model writes none, so a user's tests see that."""
    monkeypatch.chdir(tmp_path)
    answer = json.dumps({"tests": ["assert f(1) == 2"]})
    write_data(tmp_path / "data.jsonl", answer=answer, verifier="code")
    train(options(**{"verify.run_code": True, "steps": 1}))
    rollouts = read_rollouts(rollouts_path(tmp_path / "runs" / "run", 1))
    assert {rollout["success"] for rollout in rollouts} == {False}
    (row,) = [r for r in read_metrics(Path("runs/run/metrics.jsonl")) if r["step"] == 1]
    assert row["verify/failed"] == 0
