"""The text of the page."""

from __future__ import annotations

from day_one.page import page, table
from day_one.registry import STAGES
from day_one.results import Item, Result

FACTS = {"machine": "NVIDIA H100", "commit": "abc1234", "torch": "2.11.0"}
PACKAGES = {"from the machine": {"numpy": "2.4.6"}, "installed aside": {}, "missing": {}}


def result(**values) -> Result:
    return Result(**{"stage": "machine", "identity": FACTS, "state": "done", **values})


def test_where_it_ran_and_what_became_of_every_stage() -> None:
    text = page([result(seconds=12.4, limit_s=60.0)], FACTS, PACKAGES)
    lines = text.splitlines()
    assert lines[0] == "# A first day on NVIDIA H100"
    assert "- commit: abc1234" in lines
    assert "- from the machine: numpy 2.4.6" in lines
    assert not any("installed aside" in line for line in lines)
    assert "| Machine, versions and ceilings | done | 12 | 60 | 0 | 0 |" in lines
    assert text.count("| not run |") == len(STAGES) - 1


def test_failures_come_before_the_tables() -> None:
    found = result(
        state="ended",
        items={
            "a": Item(rows=[{"table": "Copies", "what": "a|b", "GB/s": 4312.0, "ok": True}]),
            "b": Item(error="no answer within 60 s"),
        },
        left=["c", "d"],
    )
    text = page([found], FACTS, PACKAGES)
    assert "- **b**: no answer within 60 s" in text
    assert "Not tried, for want of time: c, d" in text
    assert "| ended at its time limit |" in text
    assert text.endswith(
        "### Copies\n\n| what | GB/s | ok |\n|---|---:|---|\n| a\\|b | 4312 | yes |\n"
    )


def test_results_of_another_source_say_so() -> None:
    text = page([result(identity={**FACTS, "commit": "old"})], FACTS, PACKAGES)
    assert "Measured before, with commit old." in text


def test_many_checks_that_passed_are_counted() -> None:
    rows = [{"table": "Checks", "check": f"c{n}", "text": "", "ok": n != 7} for n in range(40)]
    text = page([result(items={"all": Item(rows=rows)})], FACTS, PACKAGES)
    assert "| c7 |  | **no** |" in text
    assert "| 39 of 40 passed |  | yes |" in text
    assert "c8" not in text


def test_columns_that_some_rows_lack_and_numbers() -> None:
    rows = [{"a": 1.23456, "_hidden": 1}, {"b": None, "a": 12345.6}, {"b": True}]
    assert table(rows) == [
        "| a | b |",
        "|---:|---|",
        "| 1.235 |  |",
        "| 12346 |  |",
        "|  | yes |",
    ]


def test_rows_for_the_json_alone_make_no_table() -> None:
    text = page([result(items={"list": Item(rows=[{"_key": "x"}])})], FACTS, PACKAGES)
    assert "###" not in text
