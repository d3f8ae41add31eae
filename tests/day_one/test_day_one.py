"""The command from end to end, on a CPU and in miniature."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from day_one import main
from day_one.registry import STAGES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_day_one.sh"


def run(
    *arguments: str | Path,
    python: str = sys.executable,
    alone: bool = False,
    limit_s: float = 1800.0,
) -> subprocess.CompletedProcess[str]:
    """Start the script. alone: without a network, where this machine can take it away."""
    command = [str(SCRIPT), *map(str, arguments)]
    if alone and can_unshare():
        command = ["unshare", "--user", "--map-root-user", "--net", *command]
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--user", "--map-root-user", "--net", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


def results(out: Path) -> dict:
    return json.loads((out / main.JSON).read_text())


def test_two_stages_and_a_second_start(tmp_path: Path) -> None:
    """Without a network; then nothing is repeated."""
    options = (
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--minutes",
        "15",
        "--only",
        "machine",
        "tools",
    )
    first = run(*options, alone=True)
    assert first.returncode == 0, first.stdout + first.stderr
    found = results(tmp_path)
    assert list(found["stages"]) == ["machine", "tools"]
    assert all(stage["state"] == "done" for stage in found["stages"].values())
    assert found["identity"]["device"] == "cpu"
    rows = found["stages"]["machine"]["rows"]
    assert {row["table"] for row in rows} == {"Versions", "Copies", "GEMMs"}
    page = (tmp_path / main.PAGE).read_text()
    assert "| The learner | not run |" in page and "### GEMMs" in page

    assert run(*options).returncode == 0
    assert results(tmp_path)["stages"] == found["stages"]  # times included: nothing ran again


@pytest.mark.slow
def test_all_stages_in_miniature(tmp_path: Path) -> None:
    """Everything is done and good, and what is for a GPU alone says so."""
    done = run("--device", "cpu", "--out", tmp_path, "--minutes", "25", alone=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)["stages"]
    assert list(found) == [entry.name for entry in STAGES]
    for name, stage in found.items():
        assert (stage["state"], stage["failed"]) == ("done", 0), (name, stage)
    tables = {row.get("table") for stage in found.values() for row in stage["rows"]}
    assert tables >= {
        "Checks against float64",
        "Divergence, forward and backward",
        "Cross entropy, forward and backward",
        "Error of bfloat16 gradients",
        "Candidates",
        "Chosen",
        "A step",
        "Host syncs in a step",
        "Accuracy in percent",
        "compute-sanitizer",
        "Counters",
    }
    entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
    assert all(entry["capability"] == 0 for entry in entries)
    steps = [row for row in found["learner"]["rows"] if row["table"] == "A step"]
    assert [row.get("text", "") for row in steps[2:]] == ["flash-attn is absent"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {
        *("day_one.json", "day_one.md", "stages", "tuned.json", "work")
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--wheels", "no/such/folder"], "no/such/folder is no folder"),
        (["--minutes", "0"], "give a number above 0"),
        (["--minutes", "nan"], "give a number above 0"),
        (["--minutes", "inf"], "give a number above 0"),
        (["--only", "lunch"], "invalid choice: 'lunch'"),
    ],
)
def test_a_wrong_call_is_one_clear_line(tmp_path: Path, arguments: list[str], text: str) -> None:
    done = run("--device", "cpu", "--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert text in done.stderr and "Traceback" not in done.stderr


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--device", "cpu", "--out", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cannot be written: Not a directory" in done.stderr


def test_a_full_disk_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(main, "run_stage", full)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)  # this process keeps its handler
    assert main.main(["--device", "cpu", "--out", str(tmp_path), "--only", "machine"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path}: No space left on device" in said


def test_a_python_without_torch_is_refused(tmp_path: Path) -> None:
    """A bare Python: what is missing is named, with what to do."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", bare], check=True)
    done = run("--device", "cpu", "--out", tmp_path / "out", python=str(bare / "bin" / "python"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "must have torch" in done.stderr and "set PYTHON" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_line_says_so(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr and "--device cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / main.JSON).exists()


def test_caches_and_temporary_files_go_to_the_folder_of_results(tmp_path: Path) -> None:
    found = main.environment(STAGES[1], "cpu", tmp_path)
    inside = [name for name, value in found.items() if str(tmp_path) in value]
    assert {"TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_HOME", "MPLCONFIGDIR"} <= {*inside}
    long = main.environment(STAGES[1], "cpu", tmp_path / ("x" * 70))
    short = main.environment(STAGES[1], "cpu", Path("/tmp/x"))
    assert short["TMPDIR"] == "/tmp/x/work/tmp"
    assert long.get("TMPDIR") == os.environ.get("TMPDIR")
    assert found["PYTHONDONTWRITEBYTECODE"] == "1"
    assert found["HF_HUB_OFFLINE"] == found["PIP_NO_INDEX"] == "1"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_interpreter_is_for_cpus(tmp_path: Path, device: str, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(main, "version", lambda package: "3.9.0")
    interpreted = [
        entry.name
        for entry in STAGES
        if "TRITON_INTERPRET" in main.environment(entry, device, tmp_path)
    ]
    assert interpreted == (["numerics", "tune"] if device == "cpu" else [])


def test_the_identity_follows_the_source(tmp_path: Path, monkeypatch) -> None:
    """Another source is measured again; a page that changed is not another source."""
    for name in ("rosd_fast/a.py", "kernels/b.py", "docs/c.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    (tmp_path / "COMMIT").write_text("abc1234\n")
    monkeypatch.setattr(main, "TREE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    first = main.identity("cpu")
    assert first["commit"] == "abc1234"
    (tmp_path / "docs/c.md").write_text("2")
    assert main.identity("cpu") == first
    (tmp_path / "kernels/b.py").write_text("2")
    assert main.identity("cpu")["source"] != first["source"]
