"""The whole loop on the quickstart model, in small numbers: it resumes, stops and fails well."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosd_fast import update as update_module
from rosd_fast.background import THREAD_NAME
from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, apply_toml, load_preset
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.methods.rosd import Rosd
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.quickstart.tasks import load_split
from rosd_fast.reflection import reflect as reflect_module
from rosd_fast.report import read_rollouts, rollout_writer, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.rollout import sample
from rosd_fast.run import recorded_threads
from rosd_fast.train import train
from rosd_fast.trainer import learner as learner_module
from rosd_fast.trainer.ranks import LearnerGroup
from rosd_fast.types import TrainSample

SMALL: dict[str, Any] = {
    "steps": 2,
    "name": "run",
    "sample.problems_per_step": 4,
    "sample.group_size": 4,
    "eval.problems": 6,
    "eval.samples": 1,
    "checkpoint.every": 1,
}


def small(out: Path, **changes: Any) -> Config:
    options = SMALL | {"out": str(out)} | {key.replace("__", "."): v for key, v in changes.items()}
    return apply_args(load_preset("quickstart"), options)


def rows_without_time(run: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = (load_file(last_checkpoint(r) / "model.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    return train(small(tmp_path_factory.mktemp("finished")))


def test_rank_0s_own_work_leaves_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests may be in flight meanwhile, whose answers the event loop reads."""
    threads: dict[str, set[str]] = {}

    def record(owner: Any, name: str) -> None:
        run = getattr(owner, name)

        def recorded(*args: Any, **options: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return run(*args, **options)

        monkeypatch.setattr(owner, name, recorded)

    work = (
        (sample, "collect_groups"),
        (reflect_module, "build_reflection_requests"),
        (Rosd, "build"),
        (update_module, "pack"),
        (rollout_writer, "write_rollouts"),
        (LearnerGroup, "save"),  # to see the others' thread
    )
    for owner, name in work:
        record(owner, name)
    folder = train(small(tmp_path, steps=1, data__dev=None, data__dev_ood=None))
    assert threads.keys() == {name for _, name in work}
    assert threads.pop("save") == {threading.main_thread().name}
    assert threads.pop("write_rollouts") == {"rollouts"}
    assert set.union(*threads.values()) == {f"{THREAD_NAME}_0"}
    assert len(read_rollouts(rollouts_path(folder, 1))) == 16


def test_rollouts_that_cannot_be_written_end_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the checkpoint of their step: a resumed run samples that step again."""

    def full(path: Path, **options: Any) -> Path:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(rollout_writer, "write_rollouts", full)
    with pytest.raises(UserError, match=r"step_000001.jsonl: the rollouts cannot be written"):
        train(small(tmp_path, steps=1, data__dev=None, data__dev_ood=None))
    assert not [*tmp_path.glob("run/checkpoints/*")]


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    assert (finished / "config.toml").is_file()
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/dev/accuracy", "eval/ood/accuracy"} <= rows[0].keys() & rows[2].keys()
    for row in rows[1:]:
        assert row["loss/divergence"] > 0
        assert row["loss/grad_norm"] > 0
        assert 0 < row["rollout/distilled_frac"] <= 1
        assert {"time/sample_s", "time/reflect_s", "time/learn_s", "time/step_s"} <= row.keys()
    assert {path.name for path in (finished / "plots").glob("*.png")} >= {
        "accuracy.png",
        "loss.png",
        "distilled.png",
        "spans.png",
        "time.png",
    }


def test_rollouts_tell_which_tokens_were_corrected(finished: Path) -> None:
    lines = (finished / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 16
    distilled = [row for row in rows if row["span"]]
    assert distilled
    for row in distilled:
        length = row["span"]["end"] - row["span"]["start"]
        assert len(row["divergence"]) == length > 0
        assert row["reflection"]["explanation"]
        if not row["success"]:
            assert row["span"]["end"] == len(row["completion_ids"])  # granularity suffix
            assert row["reflection"]["quote"] in row["completion"]


def test_checkpoints_load_like_any_model(finished: Path) -> None:
    folder = last_checkpoint(finished)
    assert folder.name == "step_000002"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=False
    )
    assert model(ids).logits.shape[-1] == model.config.vocab_size


def test_a_checkpoint_says_with_how_many_threads_it_was_made(finished: Path) -> None:
    assert recorded_threads(finished, 2) == torch.get_num_threads()
    assert recorded_threads(finished, 7) is None  # such a run begins


def test_the_same_seed_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    again = train(small(tmp_path))
    assert rows_without_time(again) == rows_without_time(finished)
    assert_same_weights(again, finished)


@pytest.mark.parametrize("kind", [pytest.param("frozen", marks=pytest.mark.slow), "ema"])
def test_a_resumed_run_equals_one_that_was_not_stopped(
    kind: str, finished: Path, tmp_path: Path
) -> None:
    whole = finished if kind == "frozen" else train(small(tmp_path / "whole", teacher__kind=kind))
    config = small(tmp_path / "cut", teacher__kind=kind, eval__every=0)
    run = train(config.model_copy(update={"steps": 1}))
    train(config, resume=run)
    assert_same_weights(run, whole)
    keys = ("loss/divergence", "loss/grad_norm", "rollout/accuracy", "eval/dev/accuracy")
    ours, theirs = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (run, whole))
    assert [ours[key] for key in keys] == [theirs[key] for key in keys]


def test_a_resumed_run_keeps_its_vocabulary_order(tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss__sparsity": "entry", "eval__every": 0}
    whole = train(small(tmp_path / "whole", **options))
    config = small(tmp_path / "cut", **options)
    run = train(config.model_copy(update={"steps": 1}))
    train(config, resume=run)
    assert_same_weights(run, whole)
    assert read_metrics(run / "metrics.jsonl")[-1]["loss/active_frac"] <= 1


def test_epochs_and_a_schedule_that_a_longer_run_stretches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_set = tmp_path / "train.jsonl"
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in load_split("train")[:8]]
    train_set.write_text("".join(json.dumps(row | {"verifier": "number"}) + "\n" for row in rows))
    options: dict[str, Any] = {
        "data__train": str(train_set),
        "data__answer_instruction": "off",  # the model was trained on its prompts as they are
        "optim__schedule": "linear",
        "optim__warmup_steps": 0,
        "eval__every": 0,
    }
    config = small(tmp_path, **options)
    run = train(apply_args(config, {"epochs": "1"}))
    assert "epochs: 1 are 2 steps" in capsys.readouterr().out
    written = apply_toml(Config(), run / "config.toml")
    assert (written.steps, written.epochs) == (2, None)
    train(apply_args(written, {"steps": "4"}), resume=run)
    assert "follows the new length of 4 updates, not 2" in capsys.readouterr().out
    lr = config.optim.lr
    rates = [row["loss/lr"] for row in read_metrics(run / "metrics.jsonl") if row["step"]]
    assert rates == pytest.approx([lr, lr / 2, lr / 2, lr / 4])


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_adapters_resume_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora__rank": 4, "teacher__kind": kind, "eval__every": 0}
    whole = train(small(tmp_path / "whole", **options))
    config = small(tmp_path / "cut", **options)
    run = train(config.model_copy(update={"steps": 1}))
    train(config, resume=run)
    assert_same_weights(run, whole)
    initial = load_file(MODEL_DIR / "model.safetensors")
    ours = load_file(last_checkpoint(run) / "model.safetensors")
    assert ours.keys() == initial.keys()
    moved = {name for name in ours if not torch.equal(ours[name], initial[name].to(ours[name]))}
    assert moved and all("proj" in name for name in moved)


def test_the_best_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.0, 0.2, 0.9, 0.4, 0.5, 0.6])

    async def rated(*_: Any) -> dict[str, float]:
        return {"eval/dev/accuracy": next(accuracies)}

    monkeypatch.setattr("rosd_fast.train.evaluate_splits", rated)
    run = train(small(tmp_path, steps=5, eval__every=1, checkpoint__keep_last=1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000005",
    ]
    state = json.loads((run / "checkpoints" / "step_000002" / "trainer_state.json").read_text())
    assert state["dev_accuracy"] == 0.9


def test_steps_that_are_not_finite_are_dumped_and_five_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, calls = learner_module.span_loss, 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = own(*args, **kwargs)
        return output if calls == 1 else dataclasses.replace(output, loss=output.loss * math.inf)

    monkeypatch.setattr(learner_module, "span_loss", poisoned)
    with pytest.raises(RunFailed, match=r"not finite in 5 steps in a row.*optim\.lr"):
        train(small(tmp_path, steps=9, pack__max_tokens=100_000, eval__every=0))
    run = tmp_path / "run"
    assert "step 2 is skipped" in capsys.readouterr().out
    rows = read_metrics(run / "metrics.jsonl")
    assert [row.get("loss/skipped") for row in rows] == [None, 0, 1, 1, 1, 1]
    dumps = sorted((run / "skipped").iterdir())
    assert [path.name for path in dumps] == [f"step_{i:06d}.jsonl" for i in range(2, 7)]
    samples = [TrainSample(**json.loads(line)) for line in dumps[0].read_text().splitlines()]
    assert sum(sample.num_tokens for sample in samples) == rows[2]["loss/num_distilled_tokens"]
    first, last = (run / "checkpoints" / f"step_00000{i}" for i in (4, 5))
    weights = [load_file(path / "model.safetensors") for path in (first, last)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_disk_that_is_full_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk."""
    options = [f"--{key}={value}" for key, value in SMALL.items() if key != "steps"]
    args = [sys.executable, "-m", "rosd_fast", "train", "--out", str(tmp_path), *options]
    first = subprocess.run([*args, "--steps=1"], capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    run = tmp_path / "run"
    resume = [*args[:4], "--resume", str(run), "--steps=4"]
    before = {path: path.read_bytes() for path in last_checkpoint(run).rglob("*") if path.is_file()}
    full = subprocess.run(
        resume, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False
    )
    assert full.returncode != 0
    errors = full.stderr.strip().splitlines()
    assert len(errors) == 1 and "cannot be written" in errors[0] and "--out" in errors[0]
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    again = subprocess.run(resume, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_resuming_a_finished_run_says_so(finished: Path) -> None:
    config = small(finished.parent)
    with pytest.raises(UserError, match=r"all 2 steps are done.*--steps"):
        train(config, resume=finished)
    with pytest.raises(UserError, match="not the one that this checkpoint was made with"):
        train(small(finished.parent, optim__lr=1e-3, steps=3), resume=finished)


def test_without_any_right_rollout_a_step_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Say {i}.", "answer": "-12345", "verifier": "number"} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    # The model was trained on prompts without an answer instruction, and answers only those.
    options = {"data__answer_instruction": "off", "data__dev": None, "data__dev_ood": None}
    config = small(tmp_path, data__train=str(data), **options)
    run = train(config.model_copy(update={"steps": 1}))
    output = capsys.readouterr().out
    assert "nothing to train on" in output and "nothing to learn from" not in output
    train(config, resume=run)  # which remembers the first step
    advice = "nothing to learn from in the last 2 steps: no rollout is right: take easier problems"
    assert capsys.readouterr().out.count(advice) == 1
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["select/num_dropped_no_success"] == row["select/num_groups"] == 4
    assert row["loss/num_distilled_tokens"] == 0
    assert row["rollout/accuracy"] == 0
    before, after = (
        load_file(path / "model.safetensors") for path in (MODEL_DIR, last_checkpoint(run))
    )
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)


def test_a_run_without_any_answer_ends_with_the_reason_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"sample__max_new_tokens": 2, "select__stop_after_steps": 2, "checkpoint__every": 0}
    config = small(tmp_path, steps=9, **short)
    said = r"no rollout gave an answer in the last 2 steps \(.*: 16 of 16 rollouts; one ends in '"
    with pytest.raises(RunFailed, match=said) as failed:
        train(config)
    assert "\n" not in str(failed.value) and "data.answer_instruction" in str(failed.value)
    run = tmp_path / "run"
    output = capsys.readouterr().out
    assert "stopped after step 2 of 9; resume with: rosd-fast train --resume" in output
    assert "the verifier found no answer in any rollout (" in output
    assert last_checkpoint(run).name == "step_000002"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["rollout/answer_found_frac"] for row in rows[1:]] == [0, 0]
    with pytest.raises(RunFailed, match=said):
        train(config, resume=run)
    assert last_checkpoint(run).name == "step_000004"


def test_a_method_that_needs_no_verdict_goes_on_without_answers(tmp_path: Path) -> None:
    silent = {"sample__max_new_tokens": 2, "select__stop_after_steps": 1, "eval__every": 0}
    run = train(small(tmp_path, method="opsd", **silent))
    assert read_metrics(run / "metrics.jsonl")[-1]["rollout/trained_frac"] == 1
    with pytest.raises(RunFailed, match="in the last step"):
        train(small(tmp_path, method="opsd", loss__policy_weight=1.0, name="blend", **silent))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__divergence": "forward_kl", "span__granularity": "span"},
        {"loss__divergence": "reverse_kl", "span__granularity": "sentence"},
        {"reflect__weights": "teacher", "teacher__kind": "ema", "reflect__show_answer": True},
        {"loss__strategy": "tiled"},
        {"loss__sparsity": "mass", "loss__sparsity_bound": 0.01, "loss__vocabulary_order": False},
        {"loss__top_k": 20, "reflect__on_correct": "skip", "span__on_miss": "full"},
    ],
)
def test_other_choices_run_too(changes: dict[str, Any], tmp_path: Path) -> None:
    run = train(small(tmp_path, steps=1, data__dev=None, data__dev_ood=None, **changes))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["loss/num_distilled_tokens"] > 0
    assert row["loss/grad_norm"] > 0


def test_an_existing_run_folder_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"exists already.*--resume"):
        train(small(tmp_path))
    assert not list((tmp_path / "run").iterdir())


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_prompt_tokens"):
        train(small(tmp_path, sample__max_prompt_tokens=5))
    with pytest.raises(UserError, match="unknown placeholder"):
        train(small(tmp_path, teacher__wrong_template="{problem} {explanation} {oops}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_after_the_step_with_a_checkpoint(number: int, tmp_path: Path) -> None:
    options = SMALL | {"steps": 200, "out": tmp_path, "checkpoint.every": 0, "eval.every": 0}
    args = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "rosd_fast", "train", "--preset", "quickstart", *args],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    done = int(read_metrics(log)[-1]["step"])
    assert 2 <= done < 200
    assert last_checkpoint(tmp_path / "run").name == f"step_{done:06d}"
    assert f"rosd-fast train --resume {tmp_path / 'run'}" in output


def test_a_template_over_its_budget_is_found_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.max_prompt_tokens is 40.*Raise"):
        train(small(tmp_path, teacher__max_prompt_tokens=40))
    assert not list(tmp_path.iterdir())


def test_a_run_is_resumed_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are kept absolute in the run's config.toml, and more steps are noted there."""
    rows = [
        {"id": str(i), "prompt": problem.prompt, "answer": problem.answer, "verifier": "number"}
        for i, problem in enumerate(load_split("train")[:8])
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    run = train(small(tmp_path, data__train="train.jsonl", data__dev=None, steps=1)).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = apply_toml(Config(), run / "config.toml")
    assert config.data.train == str(tmp_path / "train.jsonl")
    train(config.model_copy(update={"steps": 2}), resume=run)
    assert apply_toml(Config(), run / "config.toml").steps == 2
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]
