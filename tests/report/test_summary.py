"""The summary has the right numbers next to the right names."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rosd_fast.errors import UserError
from rosd_fast.report import before_after, before_after_table, summarize
from rosd_fast.report.metrics import MetricsLog, read_metrics


def make_run(run: Path) -> Path:
    with MetricsLog(run / "metrics.jsonl") as log:
        log.write(0, {"eval/dev/accuracy": 0.4, "eval/dev/shop": 0.5, "eval/dev/[red]x": 0.3})
        log.write(0, {"eval/ood/accuracy": 0.30, "eval/ood/ages": 0.30, "eval/ood/tokens_mean": 9})
        log.write(5, {"eval/dev/accuracy": 0.9, "loss/divergence": 0.1})
        log.write(10, {"eval/dev/accuracy": 0.625, "eval/dev/shop": 0.75, "eval/dev/[red]x": 0.3})
        log.write(10, {"eval/ood/accuracy": 0.2796, "eval/ood/ages": math.nan})
    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def print_to_text(printable: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(printable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_table_shows_the_first_and_last_evaluation(tmp_path: Path) -> None:
    text = print_to_text(before_after_table(rows_of(make_run(tmp_path))))
    assert "step 0" in text
    assert "step 10" in text
    assert cells(text) == [
        ["in domain (dev)", "40.0%", "62.5%", "+22.5"],
        ["[red]x", "30.0%", "30.0%", "0.0"],
        ["shop", "50.0%", "75.0%", "+25.0"],
        ["out of domain (ood)", "30.0%", "28.0%", "-2.0"],
        ["ages", "30.0%", "-", "-"],
    ]


def test_intervals_have_columns_of_their_own(tmp_path: Path) -> None:
    limits = {"eval/dev/accuracy_low": 0.336, "eval/dev/accuracy_high": 0.5}
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(0, {"eval/dev/accuracy": 0.4, "eval/dev/shop": 0.5, **limits})
        log.write(5, {"eval/dev/accuracy": 0.5, "eval/dev/shop": 0.5})
    text = print_to_text(before_after_table(rows_of(tmp_path)), width=80)
    assert cells(text) == [
        ["in domain (dev)", "40.0%", "34 to 50%", "50.0%", "", "+10.0"],
        ["shop", "50.0%", "", "50.0%", "", "0.0"],
    ]


def test_changes_as_numbers(tmp_path: Path) -> None:
    changes = before_after(read_metrics(make_run(tmp_path) / "metrics.jsonl"))
    dev = changes[0]
    assert (dev.split, dev.domain, dev.first_step, dev.last_step) == ("dev", None, 0, 10)
    assert dev.points == pytest.approx(22.5)
    assert [change.domain for change in changes] == [None, "[red]x", "shop", None, "ages"]
    assert changes[-1].points is None


def test_one_evaluation_or_none(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        assert "no evaluation yet" in print_to_text(before_after_table(rows_of(tmp_path)))
        log.write(0, {"eval/dev/accuracy": 0.4})
    text = print_to_text(before_after_table(rows_of(tmp_path)))
    assert cells(text) == [["in domain (dev)", "40.0%"]]
    assert "change" not in text


def test_the_summary_lists_only_existing_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "[bold]run")
    for name in ("step_000009", "step_000010", "step_1000000"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "trainer_state.json").touch()
    for stray in ("step_2000000", "step_3000000.bak", "damaged_step_4000000", "step_x"):
        (run / "checkpoints" / stray).mkdir()
    (run / "checkpoints" / "step_3000000.bak" / "trainer_state.json").touch()
    (run / "rollouts").mkdir()
    console = Console(file=io.StringIO(), width=300, color_system=None)
    summarize(run, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+22.5" in text
    assert str(run / "metrics.jsonl") in text
    assert str(run / "rollouts") in text
    assert str(run / "checkpoints" / "step_1000000") in text
    assert "plots" not in text


def test_the_summary_has_losses_and_warnings(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 7):
            row = {"loss/divergence": 0.25 / step, "policy/loss": -0.5, "loss/grad_norm": 1e-7}
            log.write(step, row | {"loss/num_policy_tokens": 9.0})
    console = Console(file=io.StringIO(), width=60, color_system=None)
    summarize(tmp_path, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split() for line in lines if line.startswith(("policy loss", "divergence"))] == [
        ["divergence", "0.25", "->", "0.04167", "nats", "/", "token"],
        ["policy", "loss", "-0.5", "->", "-0.5"],
    ]
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith("warning: step 3: the gradient norm has been below 1e-05")


def test_a_missing_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        summarize(tmp_path)
