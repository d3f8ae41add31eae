"""Which files of a folder or a pattern are read, and data sets of the library `datasets`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import config

from rosd_fast.data.readers import hub
from rosd_fast.data.readers.base import Rows
from rosd_fast.data.readers.open import open_rows
from rosd_fast.data.sources import parse_sources
from rosd_fast.errors import UserError


def rows_of(text: str) -> Rows:
    (source,) = parse_sources(text)
    return open_rows(source)


def error_of(text: str) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, name: str, *values: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"n": {json.dumps(value)}}}\n' for value in values))
    return path


def numbers(rows: Rows) -> list[Any]:
    return [rows[i]["n"] for i in range(len(rows))]


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "sums"
    second = write(folder, "data/part-2.jsonl", 3)
    first = write(folder, "data/part-1.jsonl", 1, 2)
    write(folder, ".cache/part-0.jsonl", 0)
    write(folder, "dataset_info.json", 0)
    (folder / "notes.txt").touch()
    rows = rows_of(str(folder))
    assert numbers(rows) == [1, 2, 3]
    assert rows.files == (str(first), str(second))
    assert [rows.domain(i) for i in (0, 2)] == ["sums", "sums"]
    assert [rows.where(i) for i in (1, 2)] == [f"{first}:2", f"{second}:1"]


def test_splits_of_a_folder_are_never_mixed(tmp_path: Path) -> None:
    write(tmp_path, "train-00000-of-00002.jsonl", 1)
    write(tmp_path, "train-00001-of-00002.jsonl", 2)
    write(tmp_path, "test/a.jsonl", 3)
    text = error_of(str(tmp_path))
    assert "files of several splits: test, train" in text and f"{tmp_path}@split=train" in text
    assert numbers(rows_of(f"{tmp_path}@split=train")) == [1, 2]
    assert numbers(rows_of(f"{tmp_path}@split=test")) == [3]
    assert "no files of the split dev. It has test, train" in error_of(f"{tmp_path}@split=dev")


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "a.jsonl"  # a folder with the name of a file
    folder.mkdir()
    assert "the folder has no files with rows. Their names end in .jsonl" in error_of(str(folder))
    write(folder, "a.jsonl", 1)
    write(folder, "b.csv", 1)
    assert (
        f"files of several kinds: .csv, .jsonl. Name those that you mean, as in {folder}/*.csv"
        in (error_of(str(folder)))
    )


def test_what_is_no_file_gets_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.jsonl").symlink_to("nowhere")
    assert "It is a link to nowhere, which is not there" in error_of("link.jsonl")
    assert "Download it first" in error_of("https://host.org/x.jsonl")
    assert "Download it first" in error_of(f"{tmp_path}/s3:/x.jsonl")
    assert "there is no such split. Name one of train, dev" in error_of("quickstart")
    Path("bad.jsonl.bz2").write_bytes(b"no archive")
    assert "the file is damaged (Invalid data stream). Copy or" in error_of("bad.jsonl.bz2")


def test_a_folder_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Path, pattern: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(self / "x"))

    monkeypatch.setattr(Path, "rglob", gone)
    assert "the file cannot be read (No such file or directory)" in error_of(str(tmp_path))


def test_a_pattern_is_the_files_that_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "biology/train.jsonl", 1)
    write(tmp_path, "chemistry/train.jsonl", 2)
    write(tmp_path, "chemistry/test.jsonl", 3)
    rows = rows_of(f"{tmp_path}/*/train.jsonl")
    assert numbers(rows) == [1, 2]
    assert [rows.domain(i) for i in (0, 1)] == ["biology", "chemistry"]
    monkeypatch.chdir(tmp_path)
    assert numbers(rows_of("chemistry/*")) == [3, 2]
    assert "no file matches" in error_of("chemistry/*.csv")


def test_only_data_sets_have_splits(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", 1)
    for text in (f"{path}@split=train", "quickstart:dev@config=x"):
        assert "only folders and data sets of the hub have a split or a config" in error_of(text)


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"n": n} for n in range(5)])
    table.save_to_disk(tmp_path / "one")
    assert numbers(rows_of(str(tmp_path / "one"))) == [0, 1, 2, 3, 4]
    several = datasets.DatasetDict({"train": table, "test": table.select([3, 1])})
    several.save_to_disk(tmp_path / "two")
    text = error_of(str(tmp_path / "two"))
    assert f"has the splits train, test. Name one, as in {tmp_path}/two@split=train" in text
    rows = rows_of(f"{tmp_path}/two@split=test")
    assert numbers(rows) == [3, 1]
    assert (rows.domain(0), rows.where(1)) == ("two", f"{tmp_path}/two, row 2")
    assert "has no split dev, but train, test" in error_of(f"{tmp_path}/two@split=dev")


@pytest.fixture
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` of the test's own."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_folder_in_the_hubs_layout(data_home: Path) -> None:
    folder = data_home / "gsm8k"
    write(folder, "main/train.jsonl", 1, 2)
    write(folder, "main/test.jsonl", 3)
    write(folder, "socratic/train.jsonl", 4)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    card += "  - {split: train, path: main/train.jsonl}\n  - {split: test, path: main/test.jsonl}\n"
    card += "- config_name: socratic\n  data_files: socratic/*\n---\n"
    (folder / "README.md").write_text(card)
    assert numbers(rows_of(f"{folder}@config=main@split=train")) == [1, 2]
    text = error_of(str(folder))
    assert "Config name is missing" in text and "@config=main@split=train" in text
    assert "has the splits train, test" in error_of(f"{folder}@config=main")


def test_the_hub_out_of_reach_gets_one_line(
    data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = config.HF_HUB_OFFLINE
    text = error_of("no-such-owner/no-such-data")
    assert "no such file, and the hub cannot be reached" in text
    assert before == config.HF_HUB_OFFLINE


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = error_of("no-such-owner/no-such-data")
    assert 'need the package datasets. pip install "rosd-fast[data]"' in text
    assert hub.is_saved(tmp_path) is False
