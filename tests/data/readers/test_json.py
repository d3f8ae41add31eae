"""Rows of JSON lines and lists."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.data.readers import json as reader
from rosd_fast.data.readers.base import MAX_ROW_BYTES
from rosd_fast.data.readers.json import JsonLines, open_json
from rosd_fast.errors import RunFailed, UserError

BLANK = st.sampled_from([b"", b" ", b"\t \r", b"\r"])
VALUES = st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3)
ROWS = VALUES.map(lambda row: b"  " + json.dumps(row, ensure_ascii=False).encode())


def last_row(path: Path) -> Any:
    rows = open_json(path)
    return rows[len(rows) - 1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.one_of(BLANK, ROWS))),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9),
)
def test_rows_are_the_lines_that_are_not_blank(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[bool, bytes]],
    bom: bool,
    ends: bool,
    chunk: int,
) -> None:
    """Wherever the pieces end in which the file is indexed."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    texts = [line.strip() if tight else line for tight, line in lines]
    path.write_bytes(b"\xef\xbb\xbf" * bom + b"\n".join(texts) + b"\n" * ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK", chunk)
        rows = open_json(path)
    expected = [(n, json.loads(text)) for n, text in enumerate(texts, start=1) if text.strip()]
    assert [rows[i] for i in range(len(rows))] == [row for _, row in expected]
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}:{n}" for n, _ in expected]


def test_a_line_is_read_alone(tmp_path: Path) -> None:
    """Damage elsewhere does not matter, and nothing but the index is in memory."""
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" + "".join(f'{{"n": {n}, "x": "{"x" * 500}"}}\n' for n in range(20_000)))
    tracemalloc.start()
    rows = open_json(path)
    assert rows[15_001]["n"] == 15_000
    assert tracemalloc.get_traced_memory()[0] < 20_000 * 8 + 100_000
    tracemalloc.stop()
    with pytest.raises(UserError, match=r"a\.jsonl:1: malformed JSON"):
        rows[0]


def test_a_line_of_200_mib_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"n": 1}\n{"n": "')
        file.seek(200 * 2**20, os.SEEK_CUR)  # zeros that take no space
        file.write(b'"}\n{"n": 3}\n')
    tracemalloc.start()
    rows = open_json(path)
    assert [rows[0], rows[2]] == [{"n": 1}, {"n": 3}]
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line has 200\.0 MiB, more than the 32"):
        rows[1]
    assert tracemalloc.get_traced_memory()[1] < MAX_ROW_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "\xe9"}', r":1: the text is not UTF-8. Convert it: iconv -f latin1"),
        ('{"a": 1}'.encode("utf-16-le"), r":1: the text is not UTF-8. Convert it: iconv -f utf-16"),
        ('{"a": 1}'.encode("utf-16"), r":1: the text is not UTF-8. Convert it: iconv -f utf-16"),
        (b'{"a": ' + b"9" * 5000 + b"}", r":1: malformed JSON \(a number of more than 4300 digits"),
        (b"[" * 100_000 + b"\n", r":1: malformed JSON \(nested too deeply"),
        (b'[{"a": 1},\n{"a": ]', r":2: malformed JSON .* Close the list"),
        (b'{"a": 1}\n{"a":', r":2: malformed JSON"),
    ],
)
def test_damage_is_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        last_row(path)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, 2]))
    rows = open_json(path)
    assert [rows[0], rows[1]] == [{"a": 1}, 2]
    assert rows.where(1) == f"{path}, item 2 of the list"
    monkeypatch.setattr(reader, "MAX_LIST_BYTES", 10)
    with pytest.raises(UserError, match=r"one JSON list .* jq -c"):
        open_json(path)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(b'{"a": 1}\n{"a": 2}\n')
    path.write_bytes(whole)
    rows = open_json(path)
    assert (rows[1], rows.where(1)) == ({"a": 2}, f"{path}:2")
    for damaged in (whole[:-9], b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|cannot be read"):
            open_json(path)


def test_a_kind_of_compression_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.touch()
    with pytest.raises(UserError, match=r"Unpack it first: zstd -d "):
        open_json(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    cases = {pipe: "is a pipe", Path("/dev/zero"): "is a device", tmp_path: "is a folder"}
    for path, message in cases.items():
        failed: list[Any] = []

        def attempt(path: Path = path, failed: list[Any] = failed) -> None:
            try:
                open_json(path)
            except UserError as error:
                failed.append(str(error))

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(timeout=60)  # it would wait for a writer for ever
        assert failed and message in failed[0]


def test_a_missing_file_may_be_one_of_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=r"no such file. Did you mean .*/train\.jsonl\?"):
        open_json(tmp_path / "trian.jsonl")


def test_a_file_that_changes_while_it_is_read_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    rows = open_json(path)
    assert isinstance(rows, JsonLines)
    path.replace(tmp_path / "moved.jsonl")  # the file itself is the same
    assert rows[1] == {"a": 2}
    with (tmp_path / "moved.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(RunFailed, match="was changed while it was read"):
        rows[1]
