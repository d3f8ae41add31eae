"""The data of a run: splits of real files, and what is noted of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import DataConfig
from rosd_fast.data.datasets import load_datasets
from rosd_fast.data.keys import problem_key
from rosd_fast.data.notes import MAX_COMPARED, cross_pairs
from rosd_fast.errors import UserError

STORY = (
    "Anna has {} apples. She buys 30 more at the market on Monday and then gives ten of them to "
    "her neighbours. How many apples are left for Anna to bake a cake with?"
)


def rows_of(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": STORY.format(i), "answer": i + 20, "id": f"p{i}"} for i in numbers]


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def options(train: str, **changes: Any) -> DataConfig:
    given = {"train": train, "dev": None, "verifier": "number", **changes}
    return DataConfig.model_validate(given)


def prompts(problems: Any) -> set[str]:
    return {problem.prompt for problem in problems}


def test_a_share_is_held_out_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = rows_of(range(200))
    data = load_datasets(options(write(tmp_path / "a.jsonl", rows), dev="10%"))
    random.Random(0).shuffle(rows)
    other = load_datasets(options(write(tmp_path / "b.jsonl", rows), dev="10%"))
    assert prompts(data.dev["dev"]) == prompts(other.dev["dev"])
    assert len(data.train) + len(data.dev["dev"]) == 200
    assert not prompts(data.train) & prompts(data.dev["dev"])
    assert 5 < len(data.dev["dev"]) < 40
    for first in (1, 7):
        cut, again = (
            load_datasets(options(str(tmp_path / name), dev="10%"), first=first).dev["dev"]
            for name in ("a.jsonl", "b.jsonl")
        )
        assert len(cut) == first
        assert prompts(cut) == prompts(again) <= prompts(data.dev["dev"])
    seeded = load_datasets(options(str(tmp_path / "a.jsonl"), dev="10%", split_seed=1))
    assert prompts(seeded.dev["dev"]) != prompts(data.dev["dev"])
    count = len(data.dev["dev"])
    assert f"data.dev: 10% held out: {count} problems, by split_seed 0; {200 - count} are left" in (
        " ".join(data.notes)
    )


def test_overlaps_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "train.jsonl", rows_of(range(20)))
    dev_rows = [*rows_of(range(30, 32)), {"prompt": STORY.format(4).upper(), "answer": 24}]
    dev = write(tmp_path / "dev.jsonl", dev_rows)
    ood = write(tmp_path / "ood.jsonl", rows_of(range(31, 34)))
    data = load_datasets(options(train, dev=dev, dev_ood=ood))
    assert [p.id for p in data.train] == [f"p{i}" for i in range(20) if i != 4]
    assert len(data.dev["dev"]) == 3
    assert [p.id for p in data.dev["ood"]] == ["p32", "p33"]
    assert data.shared == [
        "data.dev_ood: 1 problem is in data.dev too and left out: ood.jsonl:1 = dev.jsonl:2",
        "data.train: 1 problem is in data.dev too and left out: train.jsonl:5 = dev.jsonl:3",
    ]
    kept = load_datasets(options(train, dev=dev, dev_ood=ood, overlap="keep"))
    assert len(kept.train) == 20
    assert len(kept.dev["ood"]) == 3
    assert [line.replace(" and left out", "") for line in data.shared] == kept.shared


def test_only_the_first_problems_are_evaluated_but_all_are_kept_out_of_training(
    tmp_path: Path,
) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(range(20)))
    dev = write(tmp_path / "dev.jsonl", rows_of(range(15, 30)))
    data = load_datasets(options(train, dev=dev), first=3)
    assert len(data.train) == 15
    assert [p.id for p in data.dev["dev"]] == ["p15", "p16", "p17"]


def test_near_duplicates_are_noted_and_stay(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "train.jsonl", rows_of(range(20)))
    near = STORY.format(7).replace("Anna", "Ben").replace("She", "He").replace("her ", "his ")
    dev = write(tmp_path / "dev.jsonl", [*rows_of(range(30, 35)), {"prompt": near, "answer": 27}])
    data = load_datasets(options(train, dev=dev))
    assert len(data.train) == 20
    assert data.shared == [
        "data.train: 1 problem is a near-duplicate of data.dev: train.jsonl:8 ~ dev.jsonl:6"
    ]
    assert cross_pairs([[(STORY, "1")], [(STORY.upper(), "1")]]) == {}  # the same problem
    assert MAX_COMPARED >= 1000


def test_what_was_read_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", rows_of(range(3)))
    write(tmp_path / "dev.jsonl", rows_of(range(3, 5)))
    data = load_datasets(options("train.jsonl", dev="dev.jsonl", dev_ood="quickstart:dev"))
    notes = data.notes
    assert notes[0].startswith("data.train: train.jsonl: 3 problems, read as plain rows")
    assert notes[1].startswith("data.train: 3 of 3 prompts end with: Give the final answer")
    assert notes[2].startswith("data.dev: dev.jsonl: 2 problems, read as plain rows")
    assert notes[3].startswith("data.dev: 2 of 2 prompts end with")
    assert len(notes) == 4  # there is nothing to tell of the quickstart
    assert load_datasets(DataConfig()).notes == []


def test_notes_show_control_characters(tmp_path: Path) -> None:
    name = tmp_path / "evil\x1b[2J\u202e.jsonl"
    write(name, rows_of(range(3)))
    notes = load_datasets(options(str(name))).notes
    assert "evil\\x1b[2J\\u202e.jsonl" in notes[0]
    assert all(note.isprintable() for note in notes)


def test_bad_rows_of_a_split(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(range(50)))
    bad = write(tmp_path / "dev.jsonl", [*rows_of(range(60, 63)), {"prompt": "x"}])
    with pytest.raises(UserError, match=r"dev\.jsonl:4: the field .answer. is missing"):
        load_datasets(options(train, dev=bad))
    data = load_datasets(options(train, dev=bad, bad_rows="skip"))
    assert len(data.dev["dev"]) == 3
    many = rows_of(range(400))
    for i in range(1, 400, 2):
        many[i] = {"prompt": many[i]["prompt"]}
    source = write(tmp_path / "many.jsonl", many)
    with pytest.raises(UserError, match="is missing"):  # unchecked rows, but held out
        load_datasets(options(source, dev="20%", check_rows=2))
    data = load_datasets(options(source, dev="20%", check_rows=2, bad_rows="skip"))
    assert all(problem.answer for problem in data.dev["dev"])
    keys = {problem_key(row["prompt"]) for row in many}
    assert len(keys) == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev": "0%"}, r"^data\.dev: '0%' is not a share"),
        ({"dev": "ten%"}, r"^data\.dev: 'ten%' is not a share"),
        ({"dev": "0.01%"}, r"^data\.dev: 0\.01% of 5 problems holds none of them out"),
        ({"dev_ood": "10%"}, r"^data\.dev_ood: '10%' is a share, not data\. .*data\.dev=10%"),
        ({"train": "10%"}, r"^data\.train: '10%' is a share, not data"),
    ],
)
def test_shares_that_make_no_split(tmp_path: Path, changes: Any, message: str) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(range(5)))
    with pytest.raises(UserError, match=message):
        load_datasets(options(**{"train": train, **changes}))


def test_all_of_training_in_dev(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(range(5)))
    with pytest.raises(UserError, match=r"data\.train: every problem is in data\.dev too"):
        load_datasets(options(train, dev=train))
    assert len(load_datasets(options(train, dev=train, overlap="keep")).train) == 5
