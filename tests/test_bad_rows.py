"""A run on a data set of which only some rows were checked before it began."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.quickstart.tasks import load_split
from rosd_fast.report import read_rollouts, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train


def test_bad_rows_are_replaced_counted_and_noted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the second step's rows one is cut off, and the prompt of one is too long."""
    rows = [
        json.dumps({"id": p.id, "prompt": p.prompt, "answer": p.answer, "verifier": p.verifier})
        for p in load_split("train")[:8]
    ]
    rows[3] = rows[3][:20]
    rows[5] = json.dumps({**json.loads(rows[5]), "id": "long", "prompt": "2 + 2 = ? " * 500})
    source = tmp_path / "train.jsonl"
    source.write_text("\n".join(rows))
    options = {
        "steps": 2,
        "out": str(tmp_path),
        "name": "run",
        "sample.problems_per_step": 3,
        "sample.group_size": 2,
        "data.train": str(source),
        "data.dev": None,
        "data.dev_ood": None,
        "data.shuffle": False,
        "data.check_rows": 2,
    }
    folder = train(apply_args(load_preset("quickstart"), options))
    metrics = read_metrics(folder / "metrics.jsonl")
    counts = [row["data/num_bad_rows"] for row in metrics if row["step"] > 0]
    assert counts == [0, 2]
    names = [r["rollout_id"].rpartition("/")[0] for r in read_rollouts(rollouts_path(folder, 2))]
    expected = [json.loads(rows[i])["id"] for i in (6, 4, 7)]
    assert list(dict.fromkeys(names)) == expected
    shown = capfd.readouterr().out
    assert f"left out: {source}:4: malformed JSON" in shown
    assert "left out: problem long: its prompt has" in shown
