"""`rosd-fast train`: whose options it takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rosd_fast.commands.train import read_config
from rosd_fast.errors import UserError

OLD_RUN = Path(__file__).parents[1] / "config" / "old_run.toml"


def test_resume_reads_a_run_with_old_option_names_and_config_refuses_it(tmp_path: Path) -> None:
    shutil.copy(OLD_RUN, tmp_path / "config.toml")
    config = read_config({"resume": str(tmp_path), "steps": "99"})
    assert (config.steps, config.loss.importance_clip) == (99, 3.5)
    with pytest.raises(UserError, match=r"config\.toml:\d+: loss\.is_clip is now"):
        read_config({"config": str(tmp_path / "config.toml")})
