"""A run that is resumed between steps ends with the bits of one that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rosd_fast.run
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from tests.methods.proof.quickstart import options

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "optim__updates_per_step": 2, "policy__dual_clip": 3.0},
    "sdpo and grpo": {
        "method": "sdpo",
        "teacher__kind": "ema",
        "loss__policy_weight": 0.5,
        "select__on_no_success": "keep",
    },
}


def last_state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, moments and averages."""
    folder = max((run / "checkpoints").iterdir())
    assert folder.name == "step_000002"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.name}:{name}": tensor for f in files for name, tensor in load_file(f).items()}


@pytest.mark.parametrize("case", CASES)
def test_resumed_to_the_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosd_fast.run, "finish", lambda run: None)  # plots take seconds
    changes = {
        "steps": 2,
        "sample__problems_per_step": 3,
        "checkpoint__every": 1,
        "optim__warmup_steps": 2,
        **CASES[case],
    }
    whole = train(options(**changes, out=str(tmp_path / "whole")))
    config = options(**changes, out=str(tmp_path / "cut"))
    run = train(config.model_copy(update={"steps": 1}))
    train(config, resume=run)
    expected, found = last_state(whole), last_state(run)
    assert found.keys() == expected.keys() and len(found) > 50
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    rows = [read_metrics(folder / "metrics.jsonl")[-1] for folder in (run, whole)]
    ours, theirs = (
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in rows
    )
    assert ours == theirs and ours["policy/loss"] != 0
