"""`eval.overlap`: a step is evaluated while the next one runs, and nothing is lost to a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset, to_toml
from rosd_fast.inputs import load_inputs
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from rosd_fast.trainer.checkpoint import checkpoints, latest_checkpoint
from tests.engines.sglang.fake_sglang import FakeSglang

STEPS, SAMPLES = 3, 2


class GradedSglang(FakeSglang):
    """Answers some problems right, by the version of its weights.

    seen: (step of the request or "eval", step of the weights), of each request that was answered.
    held: the step whose evaluation is never answered; None: that of a step is held until the next
        step has sampled.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        inputs = load_inputs(config)
        self.tokenizer, self.stop = inputs.model.tokenizer, inputs.model.stop_token_ids[0]
        problems = [*inputs.problems, *(p for ps in inputs.dev_splits.values() for p in ps)]
        self.answers = {
            inputs.chats.student.render_problem(problem): problem.answer for problem in problems
        }
        self.dev = [inputs.chats.eval.render_problem(p) for p in inputs.dev_splits["dev"]]
        self.seen: list[tuple[str, int]] = []
        self.sampled = 0
        self.held: int | None = None

    @property
    def step(self) -> int:
        return int(self.version.rpartition("-")[2])

    def accuracy(self, step: int) -> float:
        """The accuracy on the dev split with the weights of a step."""
        right = [is_right(ids, index, step) for ids in self.dev for index in range(SAMPLES)]
        return sum(right) / len(right)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        kind = body.get("rid", "/check").split("/")[1]
        if kind.startswith("step"):
            self.sampled = max(self.sampled, int(kind.removeprefix("step")))
        if kind == "eval":
            async with asyncio.timeout(60):  # then the request fails, and the run
                while self.step == self.held or self.sampled < min(self.step + 1, STEPS):
                    await asyncio.sleep(0.01)
        self.seen.append((kind, self.step))
        return await super()._generate(request)

    def completion(self, prompt_ids: list[int], index: int, version: str) -> dict[str, Any]:
        right = is_right(prompt_ids, index, self.step)
        answer = self.answers[tuple(prompt_ids)] if right else "nothing"
        ids = [*self.tokenizer.encode(f"<answer>{answer}</answer>"), self.stop]
        made = super().completion(prompt_ids, index, version)
        made["output_ids"] = ids
        made["meta_info"]["output_token_logprobs"] = [[-0.5, token, None] for token in ids]
        return made


def is_right(prompt_ids: Sequence[int], index: int, step: int) -> bool:
    """Whether a completion is right: it depends on the weights."""
    return (sum(prompt_ids) + index + step) % (2 + step % 2) == 0


@contextmanager
def serving(fake: FakeSglang) -> Iterator[str]:
    """The URL of the server, which runs in a thread during the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(fake.__aenter__(), loop).result(30)
        yield fake.url
        asyncio.run_coroutine_threadsafe(fake.__aexit__(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def options(out: Path, url: str = "http://127.0.0.1:1", **changes: Any) -> Config:
    given = {
        "method": "grpo",
        "steps": STEPS,
        "out": str(out),
        "name": "run",
        "sample.problems_per_step": 4,
        "sample.group_size": 4,
        "eval.every": 1,
        "eval.problems": 6,
        "eval.samples": SAMPLES,
        "eval.overlap": True,
        "checkpoint.every": 1,
        "checkpoint.keep_last": 1,
        "engine.kind": "sglang",
        "engine.launch": "urls",
        "engine.urls": url,
        "engine.max_logprob_gap": 0,
    }
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return apply_args(load_preset("quickstart"), given | changed)


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint; 0: there is none."""
    path = latest_checkpoint(run)
    return 0 if path is None else int(path.name.removeprefix("step_"))


def content(run: Path) -> dict[str, Any]:
    """The rows of a run without times, and its checkpoints with their accuracies."""
    rows = read_metrics(run / "metrics.jsonl")
    states = [json.loads((path / "trainer_state.json").read_text()) for path in checkpoints(run)]
    return {
        "rows": [
            {name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}
            for row in rows
        ],
        "checkpoints": [(state["step"], state["dev_accuracy"]) for state in states],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GradedSglang]:
    folder = tmp_path_factory.mktemp("undisturbed")
    fake = GradedSglang(options(folder))
    with serving(fake) as url:
        return train(options(folder, url)), fake


def test_a_step_is_evaluated_with_its_own_weights_while_the_next_one_runs(
    undisturbed: tuple[Path, GradedSglang],
) -> None:
    """The server answers the evaluation of a step only when the next one has asked it."""
    run, fake = undisturbed
    evaluated = [step for kind, step in fake.seen if kind == "eval"]
    assert evaluated == sorted(evaluated) and set(evaluated) == set(range(STEPS + 1))
    rows = content(run)["rows"]
    kinds = [(row["step"], "eval/dev/accuracy" in row) for row in rows]
    assert kinds == [
        (0, True),
        *((step, ended) for step in range(1, STEPS + 1) for ended in (False, True)),
    ]
    accuracies = [row["eval/dev/accuracy"] for row in rows if "eval/dev/accuracy" in row]
    assert accuracies == [fake.accuracy(step) for step in range(STEPS + 1)]
    assert len(set(accuracies)) > 1
    timed = [row for row in read_metrics(run / "metrics.jsonl") if "time/evaluate_s" in row]
    assert {row["step"] for row in timed} == set(range(1, STEPS + 1))  # the waits, and the last


def test_the_best_checkpoint_stays_although_it_was_rated_late(
    undisturbed: tuple[Path, GradedSglang],
) -> None:
    found = content(undisturbed[0])
    accuracies = {
        row["step"]: row["eval/dev/accuracy"]
        for row in found["rows"]
        if row["step"] and "eval/dev/accuracy" in row
    }
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert best < STEPS
    assert found["checkpoints"] == [(step, accuracies[step]) for step in (best, STEPS)]


@pytest.mark.parametrize("held", [pytest.param(1, marks=pytest.mark.slow), STEPS])
def test_a_kill_during_an_evaluation_changes_nothing(
    held: int, undisturbed: tuple[Path, GradedSglang], tmp_path: Path
) -> None:
    fake = GradedSglang(options(tmp_path))
    fake.held = held
    run = tmp_path / "run"
    with serving(fake) as url:
        config = options(tmp_path, url)
        (tmp_path / "config.toml").write_text(to_toml(config))
        args = ["train", "--config", str(tmp_path / "config.toml")]
        process = subprocess.Popen([sys.executable, "-m", "rosd_fast", *args])
        try:
            end = time.monotonic() + 120
            # The last step's evaluation starts after its checkpoint; another one's step goes on.
            while newest(run) != held:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert content(run)["checkpoints"][-1] == (held, None)
        fake.held = None
        assert train(config, resume=run) == run
    assert content(run) == content(undisturbed[0])


def test_with_one_step_ahead(tmp_path: Path) -> None:
    """The rollouts may be older by one version; the evaluation never is."""
    fake = GradedSglang(options(tmp_path))
    with serving(fake) as url:
        run = train(options(tmp_path, url, engine__one_step_ahead=True))
    rows = read_metrics(run / "metrics.jsonl")
    evaluated = [row for row in rows if "eval/dev/accuracy" in row]
    assert [(row["step"], row["eval/dev/accuracy"]) for row in evaluated] == [
        (step, fake.accuracy(step)) for step in range(STEPS + 1)
    ]


def test_a_run_that_is_asked_to_stop_saves_before_it_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, saved = tmp_path / "run", []

    async def rated(*_: Any) -> dict[str, float]:
        saved.append([path.name for path in checkpoints(run)])
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval/dev/accuracy": 0.5 + len(saved)}

    monkeypatch.setattr("rosd_fast.train.evaluate_splits", rated)
    local = {"engine__kind": "local", "engine__launch": "local", "engine__urls": ""}
    config = options(tmp_path, eval__overlap=False, checkpoint__asynchronous=False, **local)
    assert train(config) == run
    assert saved == [[], ["step_000001"]]
    found = content(run)
    assert [row["step"] for row in found["rows"]] == [0, 1, 1]
    assert found["rows"][-1] == {"step": 1, "eval/dev/accuracy": 2.5}
    assert found["checkpoints"] == [(1, 2.5)]
