"""The report: JSON, Markdown, terminal and picture say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from rosd_fast.evaluation.picture import figure
from rosd_fast.evaluation.report import (
    Report,
    make_report,
    markdown,
    print_report,
    shown_draws,
    write_report,
)
from tests.evaluation.completions import make

NEW = [
    *make("a", "4", "4", "-5", "-5"),
    *make("b", "2", "2", "2", "2", domain="dates|*"),
    *make("c", "1", "-1", "-1", "-1", split="hard"),
]
OLD = [*make("a", "4", "-5", "-5", "-5"), *make("b", "-1", "2", "2", "2", domain="dates|*")]


@pytest.fixture
def report() -> Report:
    return make_report("new", NEW, other="old", other_completions=OLD)


def test_the_json_has_every_figure(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["model"], found["samples"]) == ("new", 4)
    assert found["total"]["num_problems"] == 3
    assert found["data"]["test"]["all"]["accuracy"]["value"] == 0.75
    assert found["data"]["test"]["domains"].keys() == {"dates|*", "sums"}
    assert found["data"]["hard"]["all"]["pass_at"].keys() == {"1", "2", "3", "4"}
    assert found["data"]["hard"]["domains"] == {"sums": found["data"]["hard"]["all"]}
    against = found["against"]
    assert against["model"] == "old"
    assert against["difference"]["data"]["test"]["all"]["accuracy"]["value"] == 0.25
    assert against["difference"]["total"]["num_problems"] == 2
    # Of the other model, only where it has all problems.
    assert against["total"] is None and against["data"].keys() == {"test"}
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text() == markdown(report)


def test_the_markdown_has_the_same(report: Report) -> None:
    text = markdown(report)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].split(" | ")[2:6] == ["mean@4", "pass@2", "pass@4", "maj@4"]
    assert lines[2].startswith("| **test** | 2 | 75.0 [")
    assert lines[3].startswith("| dates\\|\\* | 1 | 100.0 [")
    widths = {line.replace("\\|", "").count("|") for line in lines[:7]}
    assert len(widths) == 1
    assert "**new** minus **old**, points" in text
    assert "| **test** | 2 | 50.0 | 75.0 | +25.0 [" in text


def test_the_terminal_is_as_wide_as_it_is(report: Report) -> None:
    for width, shown in ((80, "50.0"), (120, "50.0 [")):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        print_report(report, console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "test" in text and "dates|*" in text and "+25.0 [" in text
        row = next(line for line in text.splitlines() if line.strip().startswith("sums"))
        assert row.rstrip().endswith(shown) or shown in row
    assert "answer found in 100.0%" in text


def test_long_names_leave_room_for_the_figures() -> None:
    names = [f"a_long_name_of_a_data_set_about_{i}" for i in "xy"] + ["line\nbreak", "化学" * 20]
    completions = [c for name in names for c in make("a", "4", "4", split=name)]
    report = make_report("m" * 40, completions, other="n" * 40, other_completions=completions)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    print_report(report, console)
    text = console.export_text()
    assert text.count("100.0 [20.7, 100.0]") == 4 and text.count("+0.0 [-98.0, +98.0]") == 4
    assert "+0.0 [-39.2, +39.2]" in text and text.count("line break") == 2
    for name in ("out_x", "out_y"):
        assert text.count(name) == 2
    (axes,) = figure(report).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len({*labels}) == 5


def test_one_sample_has_no_pass_at_and_no_majority() -> None:
    report = make_report("m", [*make("a", "4"), *make("b", "-1")])
    assert shown_draws(1) == [] and shown_draws(4) == [2, 4] and shown_draws(6) == [2, 4, 6]
    assert "pass@" not in markdown(report) and "maj@" not in markdown(report)


def test_the_picture_has_a_row_per_scope(report: Report) -> None:
    (axes,) = figure(report).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["test (2)", "dates|* (1)", "sums (1)", "hard (1)", "all (3)"]
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("75.0%") == 2 and "58.3%" in texts
    assert axes.get_xlim() == (0, 1)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["new", "old"]


def test_many_domains_are_left_out_of_the_picture() -> None:
    many = [c for i in range(90) for c in make(f"p{i}", "1", domain=f"d{i}")]
    (axes,) = figure(make_report("m", many)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["test (90)"]
