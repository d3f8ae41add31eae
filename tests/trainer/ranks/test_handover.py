"""Weights leave a sharded student bucket by bucket, and reach it from files, without any change."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import module_command
from tests.trainer.ranks.test_ranks import ROOT


def run(ranks: int, out: Path, *args: str, module: str = "handover") -> None:
    result = subprocess.run(
        module_command(ranks, f"tests.trainer.ranks.{module}", out, *args),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def first_weights(out: Path) -> dict[str, bytes]:
    """The files for servers with the initial weights, by case."""
    files = sorted(out.glob("*/weights/v000000/model.safetensors"))
    return {file.parts[-4]: file.read_bytes() for file in files}


@pytest.mark.slow
def test_one_rank_and_two_write_the_same_files(tmp_path: Path) -> None:
    run(1, tmp_path / "one", "--few")
    run(2, tmp_path / "two", "--few")
    one, two = first_weights(tmp_path / "one"), first_weights(tmp_path / "two")
    assert len(one) == 3 and one == two


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_case(tmp_path: Path, ranks: int) -> None:
    """No size is a multiple of 3; of 4 ranks, two hold another copy and send nothing."""
    run(1, tmp_path / "one")
    run(ranks, tmp_path / "more", *(["--shard-size", "2"] if ranks == 4 else []))
    one, more = first_weights(tmp_path / "one"), first_weights(tmp_path / "more")
    assert len(one) == 10 and one == more


def counts(ranks: int, out: Path, *args: str) -> dict[str, tuple[int, ...]]:
    """By case: how many of the student's parameters were read, of how many, in how many models."""
    run(ranks, out, *args, module="loading")
    return {
        path.name: tuple(int(n) for n in path.read_text().split())
        for path in out.iterdir()
        if path.is_file()
    }


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_rank_reads_its_shards_from_the_files(tmp_path: Path, ranks: int) -> None:
    """All but what the files do not have as it is: adapters, and experts, which are fused."""
    found = counts(ranks, tmp_path)
    for case in ("whole", "tied", "rows"):
        read, total, models = found[case]
        assert read == total > 10 and models == 2  # and as much for the teacher
    read, total, _ = found["lora"]
    assert total - read == 28  # of 7 layers in each of 2 blocks
    read, total, _ = found["experts"]
    assert total - read == 4
    read, total, _ = found["changed"]
    assert total - read == 1


@pytest.mark.slow
def test_a_rank_with_other_files_gets_all_shards_sent(tmp_path: Path) -> None:
    found = counts(2, tmp_path, "--other-files")
    assert {read for read, _, _ in found.values()} == {0}
