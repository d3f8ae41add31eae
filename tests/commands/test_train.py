"""`rosd-fast train`: whose options it takes, and the name of its run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.commands.train import note_unread, read_config, with_free_name
from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset, to_toml
from rosd_fast.errors import UserError

OLD_RUN = Path(__file__).parents[1] / "config" / "old_run.toml"


def test_resume_reads_a_run_with_old_option_names_and_config_refuses_it(tmp_path: Path) -> None:
    shutil.copy(OLD_RUN, tmp_path / "config.toml")
    config = read_config({"resume": str(tmp_path), "steps": "99"})
    assert (config.steps, config.loss.importance_clip) == (99, 3.5)
    with pytest.raises(UserError, match=r"config\.toml:\d+: loss\.is_clip is now"):
        read_config({"config": str(tmp_path / "config.toml")})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run of the quickstart, named exp."""
    folder = tmp_path / "runs" / "exp"
    folder.mkdir(parents=True)
    given = {"name": "exp", "out": str(folder.parent), "seed": "7"}
    (folder / "config.toml").write_text(to_toml(apply_args(load_preset("quickstart"), given)))
    return folder


@pytest.mark.parametrize("option", ["like", "config"])
def test_a_run_like_another_has_its_options_and_a_name_of_its_own(
    finished: Path, option: str
) -> None:
    config = read_config({option: str(finished), "optim.lr": "1e-4"})
    before = read_config({"resume": str(finished)})
    optim = before.optim.model_copy(update={"lr": 1e-4})
    assert config == before.model_copy(update={"name": None, "optim": optim})
    assert read_config({option: str(finished), "name": "mine"}).name == "mine"


def test_a_run_like_an_older_one_reads_the_old_names(tmp_path: Path) -> None:
    shutil.copy(OLD_RUN, tmp_path / "config.toml")
    config = read_config({"like": str(tmp_path)})
    assert (config.loss.importance_clip, config.data.answer_instruction) == (3.5, "off")


def test_a_taken_name_of_a_file_becomes_a_free_one(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config({"config": str(finished / "config.toml")})
    assert config.name == "exp"
    assert with_free_name(config).name == "exp-2"
    assert capsys.readouterr().out == f"{finished} exists already, so this run is exp-2\n"
    (finished.parent / "exp-2").mkdir()
    assert with_free_name(config).name == "exp-3"
    capsys.readouterr()
    shutil.rmtree(finished)
    for same in (config, Config()):
        assert with_free_name(same) == same
    assert capsys.readouterr().out == ""


def test_mistakes_of_like(tmp_path: Path) -> None:
    for given, message in (
        ({"like": "no"}, "no: there is no such run folder"),
        ({"like": str(tmp_path)}, "holds no config.toml"),
        ({"config": str(tmp_path)}, "holds no config.toml"),
        ({"like": "a", "config": "b"}, "--config and --like exclude each other"),
        ({"like": "a", "resume": "b"}, "--like cannot be changed when a run is resumed"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(given)


def test_options_that_the_method_does_not_read_are_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def noted(**given: Any) -> str:
        options = {name.replace("__", "."): value for name, value in given.items()}
        note_unread(read_config(options), options)
        return capsys.readouterr().out

    assert noted(method="grpo", preset=("quickstart",)) == ""  # a preset is not the user's choice
    said = noted(method="grpo", span__granularity="span", optim__lr="1e-3", reflect__mode="free")
    assert said == "the method grpo does not read reflect.mode, span.granularity\n"
    assert noted(reflect__mode="free") == ""
    many = {f"reflect__{name}": "0" for name in ("temperature", "probe_every")}
    many |= {f"span__{name}": "1" for name in ("min_score", "negative_weight")}
    assert noted(method="sft", **many, policy__clip_low="0.1", teacher__kind="ema").endswith(
        "does not read reflect.temperature, reflect.probe_every, span.min_score, "
        "span.negative_weight and 1 more\n"
    )
    file = tmp_path / "own.toml"
    file.write_text("method = 'grpo'\n[reflect]\nthink = true\nmode = 'verbatim'\n")
    assert noted(config=str(file)) == "the method grpo does not read reflect.think\n"
    said = noted(config=str(file), span__granularity="span")  # the command line comes first
    assert said == "the method grpo does not read span.granularity, reflect.think\n"
    assert noted(like=str(finished), method="grpo") == ""
    assert noted(config=str(finished), method="grpo") == ""
    assert noted(config=str(finished / "config.toml"), method="grpo") == ""
