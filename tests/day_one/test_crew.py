"""Items in worker processes: what becomes of one that crashes, and of one that hangs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from day_one.crew import run_items
from day_one.results import Item

# Answers like day_one.worker; the item's key says what happens.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    key = json.loads(line)["key"]
    if "dies" in key:
        print("something went wrong", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if "hangs" in key:
        time.sleep(100)
    if "meets" in key:  # until two workers are here
        open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
        while len(os.listdir(sys.argv[1])) < 2:
            time.sleep(0.01)
    print(json.dumps({"rows": [{"key": key, "pid": os.getpid()}]}), flush=True)
"""


def run(keys: list[str], folder: Path, *, workers: int = 1, seconds: float = 60.0, item_s=30.0):
    found: dict[str, Item] = {}
    (folder / "here").mkdir()
    left = run_items(
        {key: {} for key in keys},
        lambda key, item: found.update({key: item}),
        command=[sys.executable, "-c", WORKER, str(folder / "here")],
        log=folder / "log",
        workers=workers,
        item_s=item_s,
        end=time.monotonic() + seconds,
    )
    return found, left


def test_a_worker_answers_one_item_after_the_other(tmp_path: Path) -> None:
    found, left = run(["a", "b", "c"], tmp_path)
    assert left == []
    assert [item.rows[0]["key"] for item in found.values()] == ["a", "b", "c"]
    assert len({item.rows[0]["pid"] for item in found.values()}) == 1


def test_workers_share_the_items(tmp_path: Path) -> None:
    found, left = run(["meets 1", "meets 2", "a"], tmp_path, workers=2)
    assert len(found) == 3 and left == []
    assert len({item.rows[0]["pid"] for item in found.values()}) == 2


def test_a_crash_costs_one_item_and_says_why(tmp_path: Path) -> None:
    found, left = run(["a", "dies", "b"], tmp_path)
    assert left == []
    assert found["dies"].rows == []
    assert "died (-9)" in found["dies"].error and "something went wrong" in found["dies"].error
    assert found["b"].error == "" and found["b"].rows[0]["pid"] != found["a"].rows[0]["pid"]


def test_an_item_that_hangs_is_ended(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("day_one.crew.START_S", 3.0)
    found, left = run(["hangs", "a"], tmp_path, item_s=3.0)
    assert left == []
    assert found["hangs"].error == "no answer within 6 s"
    assert found["a"].rows and found["a"].error == ""


def test_what_an_item_has_started_ends_with_it(tmp_path: Path, monkeypatch) -> None:
    """A tool that hangs must not go on beside the next item."""
    monkeypatch.setattr("day_one.crew.START_S", 5.0)
    start = "import subprocess; subprocess.run(['sleep', '1000'])"
    code = f"import os; os.getppid(); print(os.getpid(), file=open('pid', 'w')); {start}"
    found: dict[str, Item] = {}
    monkeypatch.chdir(tmp_path)
    run_items(
        {"a": {}},
        lambda key, item: found.update({key: item}),
        command=["sh", "-c", f'{sys.executable} -c "{code}"; true'],
        log=tmp_path / "log",
        workers=1,
        item_s=1.0,
        end=time.monotonic() + 60,
    )
    assert "no answer" in found["a"].error
    deadline = time.monotonic() + 10
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/exe").exists()


def test_items_without_time_are_left_and_not_failed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("day_one.crew.START_S", 0.0)
    found, left = run(["a", "hangs", "b"], tmp_path, seconds=8.0)
    assert list(found) == ["a"]
    assert left == ["hangs", "b"]
