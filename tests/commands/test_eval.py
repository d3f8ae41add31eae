"""`rosd-fast eval`: options as a run's, folders that are gone on in, and models compared."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.cli import main
from rosd_fast.commands.eval import EngineSection, Options, unlike_run
from rosd_fast.config import (
    Config,
    EngineConfig,
    EvalConfig,
    SampleConfig,
    Section,
    SelectConfig,
    SourceConfig,
)
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError
from rosd_fast.evaluation.model import EvaluatedModel
from tests.evaluation.test_model import make_run

SAME: dict[str, type[Section]] = {
    "model": Config,
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
}
OWN_TEXT = {"model", "problems", "samples", "max_new_tokens", "seed"}
SMALL = ("--problems", "6", "--samples", "4", "--max-new-tokens", "64", "--max-rows", "8")

Run = Callable[..., str]


@pytest.fixture
def evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """`evaluate(*args)`: run the command in `tmp_path`; its output."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> str:
        code = main(["eval", *args])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize(("name", "section"), SAME.items())
def test_an_option_has_the_type_and_range_of_the_runs(name: str, section: type[Section]) -> None:
    mine, theirs = Options.model_fields[name], section.model_fields[name]
    assert mine.metadata == theirs.metadata
    assert mine.annotation == theirs.annotation
    assert (mine.description != theirs.description) == (name in OWN_TEXT)
    if name != "max_new_tokens":
        assert mine.default == theirs.default


def test_options_of_sections_are_those_of_a_run() -> None:
    for name, field in EngineSection.model_fields.items():
        assert field.annotation == EngineConfig.model_fields[name].annotation
        assert field.default == EngineConfig.model_fields[name].default
        assert field.metadata == EngineConfig.model_fields[name].metadata
    assert Options.model_fields["data"].annotation is SourceConfig
    assert EngineConfig(**EngineSection().model_dump()) == EngineConfig()


def test_ranges_hold_and_the_run_keeps_its_own_default() -> None:
    for given in ({"samples": "0"}, {"top_p": "1.5"}, {"max_new_tokens": "0"}, {"seed": "-1"}):
        with pytest.raises(UserError, match="must be"):
            apply_args(Options(), given)
    assert Options().max_new_tokens == 2048
    assert SampleConfig().max_new_tokens == 8192


def test_several_data_sets_have_figures_of_their_own(evaluate: Run, tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "sums.jsonl").write_text(text)
    out = evaluate("quickstart", "--data", "quickstart:test,sums.jsonl,quickstart:dev", *SMALL)
    assert "read as GSM8K" in out and "mean@4" in out
    folder = only(tmp_path / "evals")
    assert folder.name.startswith("quickstart-test+sums+dev-")
    assert {path.name for path in folder.iterdir()} == {
        *("settings.json", "completions.jsonl", "result.json", "table.md", "accuracy.png"),
        "run.lock",
    }
    found = json.loads((folder / "result.json").read_text())
    assert {name: part["all"]["num_problems"] for name, part in found["data"].items()} == {
        "test": 6,
        "sums": 3,
        "dev": 6,
    }
    assert found["total"]["num_problems"] == 15
    assert found["data"]["test"]["all"]["pass_at"].keys() == {"1", "2", "3", "4"}
    settings = json.loads((folder / "settings.json").read_text())
    (path,) = settings["data"]["files_sha256"]
    assert path == str(tmp_path / "sums.jsonl")
    assert {"torch", "rosd_fast", "python"} <= settings["versions"].keys()
    assert len(lines(folder)) == 15 * 4


def test_the_same_command_finds_its_evaluation_again(evaluate: Run, tmp_path: Path) -> None:
    first = evaluate("--model", "quickstart", *SMALL)
    folder = only(tmp_path / "evals")
    stored = (folder / "completions.jsonl").read_bytes()
    assert evaluate("quickstart", *SMALL) == first
    assert (folder / "completions.jsonl").read_bytes() == stored
    evaluate("quickstart", *SMALL, "--seed", "1")
    assert len([*(tmp_path / "evals").iterdir()]) == 2


def test_what_is_missing_is_sampled_as_if_nothing_had_happened(
    evaluate: Run, tmp_path: Path
) -> None:
    whole = evaluate("quickstart", *SMALL, "--name", "whole")
    evaluate("quickstart", *SMALL, "--name", "cut")
    file = tmp_path / "evals" / "cut" / "completions.jsonl"
    expected = sorted(file.read_text().splitlines())
    file.write_bytes(file.read_bytes()[:-700])  # in the middle of a line
    (file.parent / "result.json").unlink()
    again = evaluate("--resume", "evals/cut", "--engine.max-rows", "5")
    assert again.replace("evals/cut", "evals/whole") == whole
    assert sorted(file.read_text().splitlines()) == expected
    assert (file.parent / "result.json").is_file()


def test_an_evaluation_that_was_killed_goes_on(evaluate: Run, tmp_path: Path) -> None:
    args = ["quickstart", "--problems", "60", *SMALL[2:], "--name", "killed"]
    command = [sys.executable, "-m", "rosd_fast", "eval", *args]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    file = tmp_path / "evals" / "killed" / "completions.jsonl"
    while process.poll() is None and not (file.exists() and file.stat().st_size > 2000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    killed = file.read_bytes()
    assert 0 < killed.count(b"\n") < 60 * 4
    evaluate(*args)
    found = lines(file.parent)
    assert len(found) == 60 * 4
    assert len({(c["problem_id"], c["index"]) for c in found}) == 60 * 4
    kept = b"".join(
        line for line in killed.splitlines(keepends=True)[: 4 * (killed.count(b"\n") // 4)]
    )
    assert file.read_bytes().startswith(kept)


def test_sigterm_ends_like_ctrl_c(tmp_path: Path) -> None:
    args = ["quickstart", "--problems", "60", *SMALL[2:], "--name", "ended"]
    command = [sys.executable, "-m", "rosd_fast", "eval", *args]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "evals" / "ended" / "completions.jsonl"
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "stopped; go on with: rosd-fast eval --resume evals/ended\n"


def test_a_changed_file_of_a_verifier_is_another_evaluation(
    evaluate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    args = ("quickstart", *SMALL, "--verifier", "mine.py:score", "--data", "sums.jsonl")
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    for value in ("1.0", "0.0"):
        file.write_text(f"def score(completion, answer):\n    return {value}\n")
        evaluate(*args)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("evals/*/result.json")]
    assert sorted(result["total"]["accuracy"]["value"] for result in found) == [0.0, 1.0]
    file.write_text("def score(completion, answer):\n    return 0.5\n")
    folder = next((tmp_path / "evals").iterdir())
    assert main(["eval", "--resume", str(folder)]) == 2
    assert "other settings: verifiers." in capsys.readouterr().err


def test_greedy_is_one_sample(evaluate: Run, tmp_path: Path) -> None:
    out = evaluate("quickstart", *SMALL, "--temperature", "0")
    assert "mean@1" in out and "pass@" not in out
    assert len(lines(only(tmp_path / "evals"))) == 6


def test_two_models_are_compared_on_the_same_draws(evaluate: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "mine", {3: 0.5})
    out = evaluate(str(run), *SMALL, "--against", "quickstart")
    assert f"{run}: its best checkpoint, of step 3 (dev 50.0%)" in out
    assert "mine-step_000003 minus quickstart" in out
    folders = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "evals").iterdir())
    assert folders == ["mine-step_000003-test", "quickstart-test"]
    mine, base = sorted((tmp_path / "evals").iterdir())
    found = json.loads((mine / "result.json").read_text())
    difference = found["against"]["difference"]["total"]["accuracy"]
    assert difference["value"] == 0.0  # the checkpoint holds the same weights
    assert difference["low"] < 0 < difference["high"]
    assert (base / "result.json").is_file()
    stored = evaluate(str(run), *SMALL, "--against", str(base))
    assert stored == out.replace(str(tmp_path) + "/evals", "evals")
    other = evaluate(str(run), *SMALL, "--seed", "1", "--against", str(base))
    assert "minus quickstart" in other


def test_an_evaluation_that_cannot_begin_does_not_begin_with_another_model(
    evaluate: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs" / "mine", {3: 0.5})
    evaluate("quickstart", *SMALL, "--name", "x")
    assert main(["eval", "quickstart", "--seed", "1", "--name", "x", "--against", str(run)]) == 2
    assert only(tmp_path / "evals").name == "x"


def test_an_unfinished_evaluation_is_compared_as_far_as_it_is(
    evaluate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("quickstart", *SMALL, "--name", "half")
    file = tmp_path / "evals" / "half" / "completions.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:8]))
    assert main(["eval", "quickstart", *SMALL, "--name", "x", "--against", "evals/half"]) == 0
    assert "evals/half is not finished: it has 2 of 6 problems" in capsys.readouterr().err
    file.write_bytes(b"")
    assert main(["eval", "quickstart", *SMALL, "--name", "x", "--against", "evals/half"]) == 2
    assert "evals/half: has no completions yet" in capsys.readouterr().err


def test_the_development_set_is_no_test_set(evaluate: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "mine", {3: 0.5})
    out = evaluate(str(run), *SMALL, "--data", "quickstart:dev")
    assert "quickstart:dev is the development set by which mine chooses its best checkpoint" in out
    assert "development set" not in evaluate(str(run), *SMALL)


def test_mistakes_are_one_line(
    evaluate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*args: str) -> str:
        assert main(["eval", *args]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    evaluate("quickstart", *SMALL, "--name", "x")
    text = mistake("quickstart", *SMALL, "--name", "x", "--temperature", "0.5")
    assert (
        "evals/x: the evaluation in it was made with other settings: sampling.temperature" in text
    )
    text = mistake("--resume", "evals/x", "--samples", "8")
    assert "--samples cannot be changed when an evaluation goes on" in text
    assert "is not an evaluation" in mistake("--resume", "nowhere")
    assert "there is no such split" in mistake("quickstart", "--data", "quickstart:x")
    text = mistake("quickstart", *SMALL, "--data", "quickstart:dev", "--against", "evals/x")
    assert "has no data set in common with dev: it is of test" in text
    text = mistake("quickstart", *SMALL[2:], "--problems", "3", "--against", "evals/x")
    assert "has other problems in the data set test: problems was 6, is 3" in text
    assert "engine.urls needs engine.kind sglang" in mistake("--engine.urls", "http://x:1")
    text = mistake("--engine.kind", "sglang", "--engine.launch", "urls")
    assert "engine.launch urls needs engine.urls" in text
    text = mistake("quickstart", *SMALL, "--against", "evals/y")
    assert "evals/y: there is no such model folder" in text
    text = mistake("quickstart", *SMALL, "--name", "x" * 300)
    assert "cannot be written (File name too long)" in text
    file = tmp_path / "evals" / "x" / "settings.json"
    settings = json.loads(file.read_text())
    settings["options"]["samples"] = "many"
    file.write_text(json.dumps(settings))
    assert "options.samples is 'many', must be a whole number" in mistake("--resume", "evals/x")
    (tmp_path / "evals" / "mine").mkdir()
    (tmp_path / "evals" / "mine" / "notes.txt").touch()
    assert "is no evaluation" in mistake("quickstart", *SMALL, "--name", "mine")


def test_what_the_run_had_otherwise_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[data]\nanswer_instruction = "off"\n')
    model = EvaluatedModel(source="m", name="m", note="", identity={}, run=tmp_path)
    other = f"{tmp_path} was trained with --data.answer-instruction off, and is evaluated with auto"
    assert unlike_run(Options(), model) == [other]
    assert unlike_run(Options(), dataclasses.replace(model, run=None)) == []
