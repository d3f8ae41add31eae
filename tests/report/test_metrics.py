"""metrics.jsonl survives kill -9 at any byte, and rollout metrics are exact."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.errors import UserError
from rosd_fast.report.metrics import MetricsLog, read_metrics, rollout_metrics
from rosd_fast.report.series import series
from rosd_fast.types import Group, Problem, Rollout, TrainSample, Verdict

ROWS = [(0, {"eval/dev/accuracy": 0.5}), (1, {"loss/divergence": 0.25}), (2, {"loss/lr": 1e-5})]


def write_rows(path: Path) -> bytes:
    with MetricsLog(path) as log:
        for step, metrics in ROWS:
            log.write(step, metrics)
    return path.read_bytes()


def test_each_line_is_one_object_and_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"loss/divergence": 0.25, "rollout/num_rollouts": 8})
    # The line must be in the file before it is closed.
    assert path.read_text() == '{"step": 1, "loss/divergence": 0.25, "rollout/num_rollouts": 8.0}\n'
    log.close()
    log.close()


def test_non_finite_values_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}
    (row,) = read_metrics(path)
    assert row["step"] == 1
    assert row["d"] == 1.0
    assert all(math.isnan(row[name]) for name in "abc")


def test_metrics_of_an_earlier_version_are_read_under_their_current_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = (
        b'{"step": 1, "loss/is_weight_mean": 0.75, "loss/is_clipped_frac": null, '
        b'"rollout/answered_frac": 0.5}\n'
    )
    path.write_bytes(old)
    with MetricsLog(path) as log:  # a resumed run writes the new names
        new = {"loss/importance_weight_mean": 0.5, "loss/importance_clipped_frac": 0.0}
        log.write(2, new | {"rollout/answer_found_frac": 0.25})
    rows = read_metrics(path)
    assert series(rows, "loss/importance_weight_mean").values == (0.75, 0.5)
    assert math.isnan(rows[0]["loss/importance_clipped_frac"])
    assert rows[0]["rollout/answer_found_frac"] == 0.5
    assert rows[0].keys() == rows[1].keys()
    assert path.read_bytes().startswith(old)  # the file is not rewritten


def test_a_metric_cannot_replace_the_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="step"):
        log.write(1, {"step": 2.0})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


@settings(deadline=None)  # the test waits for the disk
@given(st.data())
def test_killed_at_any_byte(data: st.DataObject) -> None:
    """Whole lines survive, the rest is dropped, and the next row starts on a new line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        whole = write_rows(path)
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        # A line that only lacks its newline is complete.
        num_whole = sum(cut >= end for end in _line_ends(whole))
        assert [row["step"] for row in read_metrics(path)] == [0, 1, 2][:num_whole]
        with MetricsLog(path) as log:
            log.write(7, {"loss/divergence": 1.0})
        assert [row["step"] for row in read_metrics(path)] == [*[0, 1, 2][:num_whole], 7]


def _line_ends(data: bytes) -> list[int]:
    return [i for i, byte in enumerate(data) if byte == ord("\n")]


def test_truncate_after_drops_later_steps_and_a_broken_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = write_rows(path)
    path.write_bytes(whole + b'{"step": 3, "loss/diver\xc3')
    with MetricsLog(path) as log:
        log.write(3, {"x": 1.0})
        log.truncate_after(1)
        assert [row["step"] for row in read_metrics(path)] == [0, 1]
        log.write(2, {"y": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:2]))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_of_a_new_file_keeps_it_empty(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.truncate_after(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "line", ["{broken", "[1, 2]", '{"a": 1.0}', '{"step": 1.5}', '{"step": 1, "a": "x"}']
)
def test_a_damaged_line_in_the_middle_is_reported_with_its_number(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        MetricsLog(path)
    assert line in path.read_text()  # nothing was deleted


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


@dataclass(frozen=True)
class FakeSelection:
    kept: tuple[Group, ...]


def make_group(name: str, lengths: list[int], finish: str = "stop") -> Group:
    problem = Problem(id=name, domain="d", prompt="?", answer="1", verifier="number")
    rollouts = tuple(
        Rollout(
            id=f"{name}/{i}",
            problem_id=name,
            prompt_ids=(1,),
            completion_ids=(2,) * length,
            logprobs=(0.0,) * length,
            text="",
            finish_reason=finish,  # type: ignore[arg-type]
            policy_version=0,
        )
        for i, length in enumerate(lengths)
    )
    return Group(problem=problem, rollouts=rollouts)


def make_sample(rollout_id: str, **fields: Any) -> TrainSample:
    return TrainSample(
        rollout_id=rollout_id,
        problem_id=rollout_id.partition("/")[0],
        student_prompt_ids=(1,),
        completion_ids=(2,),
        logprobs=(0.0,),
        start=0,
        end=1,
        **fields,
    )


ANSWERS = {"a/0": "1", "a/1": "one", "b/0": ""}


def test_rollout_metrics() -> None:
    groups = [make_group("a", [1, 2]), make_group("b", [3, 6], finish="length")]
    verdicts = {
        id_: Verdict(rollout_id=id_, score=score, success=score == 1.0, answer=ANSWERS.get(id_))
        for id_, score in {"a/0": 1.0, "a/1": 0.5, "b/0": 0.0, "b/1": 0.0}.items()
    }
    samples = [
        make_sample("a/0", teacher_prompt_ids=(4,)),
        make_sample("a/0", advantage=1.0),
        make_sample("a/1", advantage=None),
        make_sample("b/0", advantage=0.0),  # its gradient is zero
    ]
    got = rollout_metrics(groups, verdicts, samples, FakeSelection(kept=(groups[0],)), 3)  # type: ignore[arg-type]
    assert got == {
        "rollout/accuracy": 0.25,
        "rollout/answer_found_frac": 0.75,
        "rollout/tokens_mean": 3.0,
        "rollout/truncated_frac": 0.5,
        "rollout/groups_kept_frac": 0.5,
        "rollout/distilled_frac": 0.25,
        "rollout/trained_frac": 0.5,
        "rollout/policy_lag_mean": 3.0,
        "rollout/num_rollouts": 4.0,
    }
    with pytest.raises(ValueError, match="no rollout"):
        rollout_metrics([], {}, [], FakeSelection(kept=()), 0)  # type: ignore[arg-type]
