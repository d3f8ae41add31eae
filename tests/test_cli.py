"""The commands, as a user meets them: output, exit codes, and one line for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import rosd_fast.quickstart
from rosd_fast import __version__
from rosd_fast.cli import COMMANDS, main
from rosd_fast.commands.train import Options
from rosd_fast.config import Config
from rosd_fast.config.arguments import as_flag, options_of
from rosd_fast.config.load import apply_args, load_preset, preset_names, preset_path, to_toml
from rosd_fast.errors import UserError

Calls = list[tuple[Config, Path | None]]


def run(*args: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rosd_fast", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a wrong call prints."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rosd-fast: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("rosd-fast: error: ").rstrip()


def replace_train(
    monkeypatch: pytest.MonkeyPatch, train: Callable[[Config, Path | None], None]
) -> None:
    """Put a stand-in where the command finds the real loop."""
    module = types.ModuleType("rosd_fast.train")
    module.train = lambda config, *, resume=None: train(config, resume)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rosd_fast.train", module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `train` was called with."""
    found: Calls = []
    replace_train(monkeypatch, lambda config, resume: found.append((config, resume)))
    return found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--sample.group-sise", "3"], "Did you mean --sample.group-size?"),
        (["train", "--sample.group-size", "x"], "--sample.group-size is 'x', must be a whole"),
        (["trian"], "unknown command trian. Did you mean train?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], message: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("rosd-fast: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["doctor", "--help"],
        ["train", "--steps", "0"],
        ["train", "--resume", "nowhere"],
        ["data", "no.jsonl"],
        ["data", "quickstart:dev", "--data.dev", "0%"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_before_the_arguments_are_right(args: list[str]) -> None:
    code = (
        f"import sys\nfrom rosd_fast.cli import main\nmain({args!r})\n"
        "slow = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rosd-fast {__version__}\n"


def test_the_help_of_train_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for option in options_of(Options).values():
        assert option.flag in text
    assert f"(default: {load_preset('quickstart').steps})" in text


def test_the_help_of_train_shows_the_defaults_of_composed_presets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help", "--preset", "quickstart", "--preset=smollm2"]) == 0
    text = capsys.readouterr().out
    assert "(default: quickstart smollm2)" in text
    assert f"(default: {load_preset('smollm2').pack.max_tokens})" in text
    assert f"(default: {load_preset('quickstart').optim.lr})" in text


def test_presets_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert [*lines] == preset_names()
    assert lines["quickstart"].startswith("A tiny model that solves about half")
    assert main(["presets", "smollm2"]) == 0
    assert capsys.readouterr().out == preset_path("smollm2").read_text()
    assert "Did you mean smollm2?" in mistake(capsys, "presets", "smolm2")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "-h"]) == 0
    text = capsys.readouterr().out
    assert f"usage: rosd-fast {name}" in text
    command = import_module(f"rosd_fast.commands.{name}")
    for alias, option in getattr(command, "ALIASES", {}).items():  # the help has one name for each
        assert as_flag(option) in text
        assert not re.search(rf"{re.escape(as_flag(alias))}(?![\w.-])", text)


def test_options_reach_the_loop(calls: Calls, tmp_path: Path) -> None:
    assert main(["train"]) == 0
    file = tmp_path / "own.toml"
    file.write_text("steps = 9\n[optim]\nlr = 1e-3\n")
    args = ["--preset", "smollm2", "--config", str(file), "--optim.lr", "2e-3", "--sample.top_k=5"]
    assert main(["train", *args]) == 0
    (first, _), (second, resume) = calls
    assert first == load_preset("quickstart")
    assert second == apply_args(
        load_preset("smollm2"), {"steps": "9", "optim.lr": "2e-3", "sample.top_k": "5"}
    )
    assert resume is None


def test_a_name_that_a_file_gives_and_a_run_has_is_changed(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exp"
    folder.mkdir()
    config = apply_args(load_preset("quickstart"), {"name": "exp", "out": str(tmp_path)})
    file = folder / "config.toml"
    file.write_text(to_toml(config))
    for args in (["--config", str(file)], ["--config", str(file), "--name", "exp"]):
        assert main(["train", *args, "--optim.lr", "1e-4"]) == 0
    assert [called.name for called, _ in calls] == [
        "exp-2",
        "exp",
    ]  # a name that is asked for stays
    assert capsys.readouterr().out.count("so this run is exp-2") == 1


def test_resume_takes_the_runs_own_options(calls: Calls, tmp_path: Path) -> None:
    config = apply_args(load_preset("quickstart"), {"seed": "7", "name": "mine"})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert main(["train", "--resume", str(tmp_path), "--steps", "99"]) == 0
    assert calls == [(apply_args(config, {"steps": "99"}), tmp_path)]


def test_resume_mistakes(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    text = mistake(capsys, "train", "--resume", folder, "--optim.lr", "1")
    assert text.startswith("--optim.lr cannot be changed when a run is resumed")
    assert "holds no config.toml" in mistake(capsys, "train", "--resume", folder)
    (tmp_path / "config.toml").write_text("steps = 'x'")
    text = mistake(capsys, "train", "--resume", folder)
    assert text.startswith(f"{folder}/config.toml:1: steps is ")
    assert "no such run folder" in mistake(capsys, "train", "--resume", f"{folder}/no")
    assert calls == []


def test_a_mistake_found_by_the_loop_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config, resume: Path | None) -> None:
        raise UserError("too long\nby far", where="problem p:1", fix="Shorten it")

    replace_train(monkeypatch, fail)
    assert mistake(capsys, "train") == "problem p:1: too long by far. Shorten it"


def test_ctrl_c_before_training_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: Config, resume: Path | None) -> None:
        raise KeyboardInterrupt

    replace_train(monkeypatch, interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "")


def test_data_shows_what_is_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sums.jsonl"
    row = {"prompt": "What is [2 + 2]?", "answer": 4, "domain": "sums", "verifier": "number"}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "system": "Be brief."}))
    assert main(["data", str(file)]) == 0
    text = capsys.readouterr().out
    assert "2 problems" in text
    assert "What is [2 + 2]?" in text
    cells = [part.strip() for part in text.replace("┃", "│").split("│")]
    assert cells[cells.index("sums") :][:4] == ["sums", "number", "1", "2"]


def test_data_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("{}\n")
    assert "no column is known as the problem" in mistake(capsys, "data", str(file))
    assert mistake(capsys, "data", str(file), "--data.dev", "0%").startswith("data.dev: '0%'")
    assert mistake(capsys, "data").startswith("no data set is named")
    assert "unexpected argument" in mistake(capsys, "data", "one", "two")


def test_report_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"step": 0, "eval/dev/accuracy": 0.25},
        {"step": 1, "loss/divergence": 0.5, "rollout/accuracy": 0.5},
        {"step": 2, "loss/divergence": 0.25, "eval/dev/accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "25.0%" in text
    assert "+50.0" in text
    assert list((tmp_path / "plots").glob("*.png"))


def test_a_report_that_cannot_be_written_is_still_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a read-only folder, which does not stop root."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/dev/accuracy": 0.25}\n')
    (tmp_path / "plots").touch()
    assert main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "25.0%" in out
    assert "the report cannot be written" in err
    assert len(err.splitlines()) == 1


def test_report_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such run folder" in mistake(capsys, "report", str(tmp_path / "no"))
    assert "no metrics.jsonl" in mistake(capsys, "report", str(tmp_path))
    assert mistake(capsys, "report").startswith("no run is named")


def test_doctor_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setattr(rosd_fast.quickstart, "MODEL_DIR", model)
    assert main(["doctor", "--out", str(tmp_path / "runs")]) == 1
    assert "missing" in capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (model / name).touch()
    assert main(["doctor", "--out", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "missing" not in text
    assert "transformers" in text
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").touch()
    assert main(["doctor", "--out", str(tmp_path / "file" / "runs")]) == 1


def test_doctor_gpu_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "sees no CUDA device" in mistake(capsys, "doctor", "--gpu")


@pytest.mark.parametrize("ok", [True, False])
def test_doctor_gpu_prints_checks_and_timings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: bool
) -> None:
    """The checks of a device, on the CPU and small."""
    import torch

    from rosd_fast.commands import doctor
    from rosd_kernels.testing import acceptance, logprob_acceptance

    shape = acceptance.Shape(16, 300, 8)
    monkeypatch.setattr(doctor, "cuda_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        acceptance,
        "checks",
        lambda device: [acceptance.Check("one", True, "fine"), acceptance.Check("two", ok, "x")],
    )
    third = acceptance.Check("three", True, "fine")
    monkeypatch.setattr(logprob_acceptance, "checks", lambda device: [third])
    for module in (acceptance, logprob_acceptance):

        def timings(device, real=module.timings):
            return real(device, shape, torch.float32, repeats=1)

        monkeypatch.setattr(module, "timings", timings)
    assert main(["doctor", "--gpu"]) == (0 if ok else 1)
    text = capsys.readouterr().out
    assert ("FAIL two: x" in text) == (not ok)
    assert f"{3 if ok else 2} of 3 checks passed" in text
    assert "JSD forward" in text and "Cross entropy forward" in text
    for name in ("chunked", "tiled", "eager", "liger", "4 GEMM sweeps", "3 GEMM sweeps"):
        assert any(line.startswith(name) and " ms" in line for line in text.splitlines()), name


def test_timing_lines() -> None:
    from rosd_fast.commands.doctor import timing_line
    from rosd_kernels.testing.acceptance import Timing

    line = timing_line(Timing("tiled", 0.0125, 3 << 20, "active 0.15"))
    assert line.split() == "tiled 12.50 ms 3 MiB at the peak active 0.15".split()
    assert timing_line(Timing("eager", None, None, "out of memory")).split() == [
        "eager",
        "out",
        "of",
        "memory",
    ]


def test_eval_prints_accuracy_by_domain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["--problems", "3", "--samples", "2", "--max-new-tokens", "4", "--out", str(tmp_path)]
    assert main(["eval", "--model", "quickstart", *args]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.strip().startswith("test"))
    assert row.split()[1:3] == ["3", "0.0"]  # four tokens hold no answer tag
    assert "100.0% cut off" in text


def test_eval_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "there is no such split" in mistake(capsys, "eval", "--data", "quickstart:x")
    assert "--samples is '0'" in mistake(capsys, "eval", "--samples", "0")
    text = mistake(capsys, "eval", "--model", str(tmp_path / "no" / "model"))
    assert "there is no such model folder" in text
