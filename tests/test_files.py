"""A file is replaced completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from rosd_fast.files import write_atomic


def test_makes_the_folder_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "new" / "a.txt", b"one")
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "a.txt", b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
