"""`rosd-fast eval`: its options are those of a run, and its own defaults are few."""

from __future__ import annotations

import pytest

from rosd_fast.commands.eval import Options
from rosd_fast.config import (
    Config,
    DataConfig,
    EngineConfig,
    EvalConfig,
    SampleConfig,
    Section,
    SelectConfig,
)
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError

SAME: dict[str, type[Section]] = {
    "model": Config,
    "verifier": DataConfig,
    "problems": EvalConfig,
    "samples": EvalConfig,
    "max_new_tokens": SampleConfig,
    "temperature": EvalConfig,
    "top_p": EvalConfig,
    "threshold": SelectConfig,
    "seed": Config,
    "dtype": Config,
    "device": Config,
    "trust_remote_code": Config,
    "max_rows": EngineConfig,
}


@pytest.mark.parametrize(("name", "section"), SAME.items())
def test_an_option_has_the_type_and_range_of_the_runs(name: str, section: type[Section]) -> None:
    mine, theirs = Options.model_fields[name], section.model_fields[name]
    assert mine.metadata == theirs.metadata
    assert mine.annotation == theirs.annotation
    if name != "max_new_tokens":
        assert mine.default == theirs.default


def test_ranges_hold_and_the_run_keeps_its_own_default() -> None:
    for given in ({"samples": "0"}, {"top_p": "1.5"}, {"max_new_tokens": "0"}, {"seed": "-1"}):
        with pytest.raises(UserError, match="must be"):
            apply_args(Options(), given)
    assert Options().max_new_tokens == 2048
    assert SampleConfig().max_new_tokens == 8192
    assert Options.model_fields["max_new_tokens"].description != (
        SampleConfig.model_fields["max_new_tokens"].description
    )
