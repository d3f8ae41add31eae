"""Weights leave a sharded student bucket by bucket, byte for byte as from the whole model."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import module_command
from tests.trainer.ranks.test_ranks import ROOT


def run(ranks: int, out: Path, *args: str) -> None:
    result = subprocess.run(
        module_command(ranks, "tests.trainer.ranks.handover", out, *args),
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
