"""The seam for methods: the loop trains on whatever a method builds, and names no stage of ROSD."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import rosd_fast.train
from rosd_fast import methods
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.errors import UserError
from rosd_fast.methods import Method, TrainingSet, register_method
from rosd_fast.report import read_rollouts, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from rosd_fast.types import ErrorSpan, Group, Reflection, TrainSample, Verdict


class SelfTeaching(Method):
    """Distills all of each correct rollout, from the plain prompt; generates nothing."""

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Any,
    ) -> TrainingSet:
        assert annotations == {}
        correct = [r for group in groups for r in group.rollouts if verdicts[r.id].success]
        spans = {
            r.id: ErrorSpan(rollout_id=r.id, start=0, end=len(r.completion_ids), source="full")
            for r in correct
        }
        samples = [
            TrainSample(
                rollout_id=r.id,
                problem_id=r.problem_id,
                student_prompt_ids=r.prompt_ids,
                teacher_prompt_ids=r.prompt_ids,
                completion_ids=r.completion_ids,
                logprobs=r.logprobs,
                start=0,
                end=len(r.completion_ids),
            )
            for r in correct
        ]
        return TrainingSet(
            samples=samples, spans=spans, metrics={"self/num_correct": float(len(correct))}
        )


def options(tmp_path: Path, **changes: Any) -> Any:
    small = {
        "steps": 1,
        "out": str(tmp_path),
        "name": "run",
        "sample.problems_per_step": 4,
        "sample.group_size": 4,
        "data.dev": None,
        "data.dev_ood": None,
    }
    return apply_args(load_preset("quickstart"), small | changes)


def test_the_loop_trains_what_a_method_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods._REGISTERED, "self", SelfTeaching)
    del methods._REGISTERED["self"]  # it is not there after the test either
    register_method("self", SelfTeaching)
    with pytest.raises(ValueError, match="already"):
        register_method("self", SelfTeaching)
    run = train(options(tmp_path, method="self"))
    row = read_metrics(run / "metrics.jsonl")[-1]
    rollouts = read_rollouts(rollouts_path(run, 1))
    correct = [rollout for rollout in rollouts if rollout["success"]]
    assert correct and row["self/num_correct"] == len(correct)
    assert row["loss/num_distilled_tokens"] == sum(len(r["completion_ids"]) for r in correct)
    # Student and teacher are the same model under the same prompt.
    assert row["loss/divergence"] == pytest.approx(0, abs=1e-6)
    assert not any(name.startswith("reflect/") for name in row)
    assert "time/reflect_s" not in row or row["time/reflect_s"] < row["time/step_s"]


def test_an_unknown_method_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no method 'rosdd'.*Did you mean rosd\?"):
        train(options(tmp_path, method="rosdd"))
    assert not (tmp_path / "run").exists()


def test_the_loop_names_no_stage_of_rosd() -> None:
    """Neither `train.py` nor `pipeline.py` imports a method, or what only ROSD needs."""
    assert rosd_fast.train.__file__ is not None
    for name in ("train.py", "pipeline.py", "run.py"):
        tree = ast.parse(Path(rosd_fast.train.__file__).with_name(name).read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [module for module in modules if module.startswith("rosd_fast.reflection")]
        assert "rosd_fast.methods.rosd" not in modules


def test_a_set_whose_samples_are_not_their_spans_is_refused_before_training() -> None:
    sample = TrainSample(
        rollout_id="p/0",
        problem_id="p",
        student_prompt_ids=(1,),
        teacher_prompt_ids=(1,),
        completion_ids=(2, 3),
        logprobs=(-1.0, -1.0),
        start=0,
        end=2,
    )
    whole = ErrorSpan(rollout_id="p/0", start=0, end=2, source="full")
    assert TrainingSet(samples=[sample], spans={"p/0": whole}).samples == [sample]
    other = ErrorSpan(rollout_id="p/0", start=1, end=2, source="quote")
    for spans in ({}, {"p/0": other}):
        with pytest.raises(ValueError, match=r"p/0: the sample trains tokens \[0, 2\)"):
            TrainingSet(samples=[sample], spans=spans)
    with pytest.raises(ValueError, match="two samples"):
        TrainingSet(samples=[sample, sample], spans={"p/0": whole})
