"""A dry run prints what a run would do, and a run that cannot fit is refused before it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rosd_fast import machine
from rosd_fast.cli import main
from rosd_fast.config import Config
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError
from rosd_fast.machine import check_memory
from rosd_fast.memory_plan import GIB
from rosd_fast.model.skeleton import build_skeleton, load_skeleton
from rosd_fast.quickstart import MODEL_DIR
from tests.qwen3_folder import write_qwen3_folder


@pytest.fixture
def qwen3(tokenizer: Any, tmp_path: Path) -> Path:
    """A model folder without weights."""
    return write_qwen3_folder(tmp_path / "models" / "Qwen3-4B", tokenizer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of chemistry questions in SciKnowEval's format."""
    folder = tmp_path / "sciknoweval-chemistry"
    folder.mkdir()
    row = {
        "kind": "mcq",
        "dataset": "sciknoweval",
        "answer": "B",
        "system": "One letter.",
    }
    rows = [{"idx": i, "prompt": f"Question {i}\n\nA: 1\nB: 2", **row} for i in range(40)]
    path = folder / "train.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 24 GiB and no GPU."""
    monkeypatch.setattr(machine, "host_memory", lambda: 24 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_a_dry_run_of_the_quickstart_shows_every_role_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--num-gpus", "1", "--gpu-memory-gib", "8"]) == 0
    text = capsys.readouterr().out
    for role in (
        "student",
        "reflector, correct rollout",
        "reflector, wrong rollout",
        "teacher, correct rollout",
        "teacher, wrong rollout",
    ):
        assert f"--- {role}: " in text
    assert "An attempt went wrong here: [the wrong part]\n[what the reflector explains]" in text
    assert "Quote the first error of the attempt and explain it.<|end|><|assistant|>" in text
    assert "Fits on a GPU of 8 GiB." in text and "This machine can run it." in text
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("no_gpu")
def test_a_model_without_weights_is_planned_and_a_run_is_refused_for_the_missing_gpu_only(
    qwen3: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["train", "--model", str(qwen3), "--data.train", str(data), "--engine.kind", "sglang"]
    args += ["--out", str(tmp_path / "runs")]
    refused = (
        f"{qwen3}: training 4,022,468,096 of 4,022,468,096 parameters takes at least 74.9 GiB, and "
        "this machine has 24.0 GiB and no GPU. Use a machine with GPUs"
    )
    assert main(["train", *args[1:], "--dry-run", "--num-gpus", "8", "--gpu-memory-gib", "80"]) == 0
    text = capsys.readouterr().out
    assert "One letter." in text and "Question" in text
    assert "weights (fp32 shard)" in text and "rank 0: whole model" in text
    assert "An SGLang server" in text
    assert f"On this machine a run would be refused: {refused}" in text
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rosd-fast: error: {refused}") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_gpu")
def test_what_fits_and_what_does_not(qwen3: Path) -> None:
    skeleton = build_skeleton(str(qwen3), dtype="bfloat16")
    config = apply_args(Config(), {"dtype": "bfloat16", "model": str(qwen3)})
    with pytest.raises(UserError, match=r"takes at least 82\.4 GiB"):
        check_memory(config, skeleton, teacher=True)
    skeleton.requires_grad_(False)
    skeleton.get_parameter("model.norm.weight").requires_grad_(True)
    check_memory(config, skeleton, teacher=True)  # 2 x 7.5 GiB
    with pytest.raises(UserError, match=r"takes at least 30\.0 GiB"):
        check_memory(config.model_copy(update={"dtype": "float32"}), skeleton, teacher=True)


def test_mistakes_stay_mistakes_in_a_dry_run(
    qwen3: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--dry-run", "--model", str(qwen3), "--data.train", str(data)]
    assert main([*args, "--sample.max-prompt-tokens", "20"]) == 2
    assert "more than sample.max_prompt_tokens" in capsys.readouterr().err
    assert main(["train", "--num-gpus", "0", "--dry-run"]) == 2
    assert "--num-gpus is '0', must be at least 1" in capsys.readouterr().err
    (qwen3 / "config.json").write_text("{}")
    assert main(args) == 2


def test_a_skeleton_is_the_model_without_memory(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "model.safetensors").unlink()
    loaded = load_skeleton(str(folder), dtype="bfloat16")
    assert {p.device.type for p in loaded.model.parameters()} == {"meta"}
    assert str(loaded.model.dtype) == "torch.bfloat16"
    whole = load_skeleton("quickstart", dtype="float32")
    assert loaded.stop_token_ids == whole.stop_token_ids
    assert loaded.context_length == whole.context_length == 1024


@pytest.mark.parametrize("preset", ["reference", "paper", "fixed", "sdpo", "opsd", "grpo"])
def test_every_method_preset_renders_its_roles(
    preset: str, qwen3: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if preset == "opsd":
        pytest.importorskip("peft")
    source = data.with_suffix(".jsonl")
    row = {"prompt": "2 + 2 = ?", "answer": "4", "verifier": "number", "reference": "2 + 2 = 4"}
    source.write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i in range(40)))
    args = ["train", "--dry-run", "--preset", preset, "--model", str(qwen3)]
    assert main([*args, "--data.train", str(source if preset == "opsd" else data)]) == 0
    text = capsys.readouterr().out
    roles = {line.partition(":")[0][4:] for line in text.split("\n") if line.startswith("--- ")}
    reflector = {"reflector, correct rollout", "reflector, wrong rollout"}
    teacher = {"teacher, correct rollout", "teacher, wrong rollout"}
    assert (
        roles
        == {
            "reference": {"student", *reflector, *teacher},
            "paper": {"student", *reflector, *teacher},
            "fixed": {"student", *reflector, *teacher},
            "sdpo": {"student", *teacher},
            "opsd": {"student", "teacher, correct rollout"},
            "grpo": {"student"},
        }[preset]
    )
    assert ("A correct solution:\n[a correct rollout]" in text) == (
        preset in ("reference", "paper", "sdpo")
    )
    if preset in ("reference", "paper"):
        assert text.count("The right answer is B.") == 1  # in the wrong rollout's reflection


CHEMISTRY = Path(__file__).parents[2] / "shared" / "data" / "sciknoweval-chemistry" / "train.json"


@pytest.mark.skipif(not CHEMISTRY.exists(), reason="the data set is not here")
@pytest.mark.usefixtures("no_gpu")
def test_the_papers_experiment_is_refused_for_the_missing_gpu_only(
    smollm2_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_qwen3_folder(tmp_path / "Qwen3-4B", smollm2_tokenizer)
    args = ["train", "--preset", "paper", "--model", str(folder), "--data.train", str(CHEMISTRY)]
    args += ["--engine.kind", "sglang"]
    assert main(args) == 2
    assert " and no GPU. Use a machine with GPUs" in capsys.readouterr().err
    assert main([*args, "--dry-run", "--gpu-memory-gib", "80"]) == 0
    text = capsys.readouterr().out
    assert "--- teacher, wrong rollout: " in text and "Please reason step by step." in text
    assert "on a GPU of 80 GiB." in text
