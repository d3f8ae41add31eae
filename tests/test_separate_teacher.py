"""`teacher.model` in a run: from the tokenizers' comparison to a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.inputs import load_inputs, with_absolute_paths
from rosd_fast.model.load import load_model
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from rosd_fast.types import Generation
from tests.teacher_folder import save_teacher


def options(out: Path, **changes: Any) -> Config:
    small = {
        "method": "opd",
        "steps": 1,
        "out": str(out),
        "name": "run",
        "sample.problems_per_step": 4,
        "sample.group_size": 4,
        "data.dev": None,
        "data.dev_ood": None,
        "checkpoint.every": 1,
    }
    return apply_args(load_preset("quickstart"), small | changes)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """The folder of a teacher of another shape, with more vocabulary rows than the student."""
    return save_teacher(tmp_path / "teacher", rows=16)


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 2}, {"teacher.offload": True, "dtype": "bfloat16"}],
    ids=["full", "lora", "offload"],
)
def test_a_step(tmp_path: Path, teacher: str, changes: dict[str, Any]) -> None:
    run = train(options(tmp_path, **{"teacher.model": teacher} | changes))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["loss/divergence"] > 0.01 and row["loss/grad_norm"] > 0


def test_the_student_as_its_own_teacher_is_a_divergence_of_zero(tmp_path: Path) -> None:
    run = train(options(tmp_path, **{"teacher.model": "quickstart"}))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["loss/num_distilled_tokens"] > 100
    assert row["loss/divergence"] == 0 and row["loss/grad_norm"] == 0


def test_it_writes_the_reflections_too(tmp_path: Path) -> None:
    """A random teacher writes noise, without a tag."""
    teacher = save_teacher(tmp_path / "teacher", rows=16)
    changes = {"method": "rosd", "reflect.weights": "teacher", "reflect.mode": "free"}
    run = train(options(tmp_path, **changes, **{"teacher.model": teacher}))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["reflect/num_reflections"] > 0 and row["reflect/well_formed_frac"] < 0.2


def test_a_resumed_run_needs_the_same_teacher(tmp_path: Path, teacher: str) -> None:
    config = options(tmp_path, **{"teacher.model": teacher})
    run = train(config)
    longer = config.model_copy(update={"steps": 2})
    original = tmp_path / "original"
    shutil.copytree(teacher, original)
    save_teacher(Path(teacher), rows=16, seed=2)
    with pytest.raises(UserError, match="made with another teacher than the model that") as error:
        train(longer, resume=run)
    assert "\n" not in str(error.value)
    shutil.rmtree(teacher)
    original.rename(teacher)
    assert train(longer, resume=run) == run
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]


def test_rollouts_with_tokens_that_the_teacher_lacks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random student samples its rows of padding, too, where they are not left out."""
    monkeypatch.setattr("rosd_fast.model.load.limit_rows", lambda *_: None)
    student = save_teacher(tmp_path / "student", rows=16)
    teacher = save_teacher(tmp_path / "teacher", hidden_size=32)
    stream, vocab_size = LocalEngine.stream, LlamaConfig.from_pretrained(teacher).vocab_size
    sampled: list[Generation] = []

    async def recording(self: LocalEngine, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for generations in stream(self, *args, **kwargs):
            sampled.extend(generations)
            yield generations

    monkeypatch.setattr(LocalEngine, "stream", recording)
    changes = {"model": student, "teacher.model": teacher, "sample.max_new_tokens": 8}
    run = train(options(tmp_path, **changes))
    unknown = sum(max(generation.completion_ids) >= vocab_size for generation in sampled)
    assert 0 < unknown < len(sampled) == 16
    known = [g for g in sampled if max(g.completion_ids) < vocab_size]
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["loss/num_distilled_tokens"] == sum(len(g.completion_ids) for g in known)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"samples left out, with a token that the teacher lacks: {unknown}" in shown


def swap_two_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    file.write_text(json.dumps(spec))


def test_another_tokenizer_is_refused_before_any_weights_are_loaded(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_two_tokens(Path(teacher))
    monkeypatch.setattr("rosd_fast.inputs.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        UserError, match=r"token \d+ is '[AB]' and the student's is '[AB]'"
    ) as error:
        load_inputs(options(tmp_path, **{"teacher.model": teacher}))
    assert str(error.value).startswith(f"teacher.model: {teacher}: its tokenizer is another one")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [True, False], ids=["run", "dry run"])
def test_a_teacher_that_cannot_teach_is_refused(tmp_path: Path, weights: bool) -> None:
    short = save_teacher(tmp_path / "short", max_position_embeddings=100)
    with pytest.raises(UserError, match="its context has 100 tokens, and a prompt and its rollout"):
        load_inputs(options(tmp_path, **{"teacher.model": short}), weights=weights)
    # Its tokenizer is complete, but the student's has a token more.
    student, teacher = (
        save_teacher(tmp_path / "student", rows=8),
        save_teacher(tmp_path / "teacher"),
    )
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(student)
    words = r"have 605 vocabulary rows in common, and the tokenizers have ids up to 605"
    config = options(tmp_path, **{"teacher.model": teacher, "model": student})
    with pytest.raises(UserError, match=words):
        load_inputs(config, weights=weights)


def test_a_teacher_needs_no_chat_template(tmp_path: Path, teacher: str) -> None:
    (Path(teacher) / "chat_template.jinja").unlink(missing_ok=True)
    file = Path(teacher) / "tokenizer_config.json"
    without = {k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}
    file.write_text(json.dumps(without))
    with pytest.raises(UserError, match="no chat template"):
        load_model(teacher, dtype="float32", device=torch.device("cpu"))
    inputs = load_inputs(options(tmp_path, **{"teacher.model": teacher}))
    assert inputs.teacher is not None
    assert inputs.teacher.num_rows == inputs.model.model.config.vocab_size
    about = inputs.teacher.describe()
    assert about.startswith("teacher, LlamaForCausalLM, ") and about.endswith("entries compared")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "teacher.model: the method opd learns from another model"),
        ({"method": "grpo", "teacher.model": "quickstart"}, "nothing is distilled"),
    ],
)
def test_options_of_the_method(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_inputs(options(tmp_path, **changes))


@pytest.mark.parametrize("kind", ["ema", "live", "trust_region"])
def test_it_is_frozen(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"teacher.model is another .*needs teacher.kind frozen"):
        options(tmp_path, **{"teacher.model": "quickstart", "teacher.kind": kind})


def test_its_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, found in (("teacher", str(tmp_path / "teacher")), ("quickstart", "quickstart")):
        config = Config.model_validate({"teacher": {"model": given}})
        assert with_absolute_paths(config).teacher.model == found
