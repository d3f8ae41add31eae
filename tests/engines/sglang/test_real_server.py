"""The SGLang engine against a real SGLang on this machine's CPUs.

These tests need an environment of 10 GB, so `make test` leaves them out; `make sglang` builds the
environment and runs them. ROSD_SGLANG_PYTHON is the path of its interpreter.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rosd_fast.cli import main
from rosd_fast.config import ChatConfig, Config, LoraConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import apply_args, load_preset, to_toml
from rosd_fast.engines.factory import open_engine, open_sglang_teacher
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.sglang.adapter_sync import AdapterSync, server_args
from rosd_fast.engines.sglang.broadcast_sync import DistributedSync
from rosd_fast.engines.sglang.client import Endpoint
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import ManagedServer, ServerSpec
from rosd_fast.engines.sglang.teacher import SglangTeacher
from rosd_fast.engines.sglang.weight_sync import DiskSync
from rosd_fast.engines.weight_check import token_logprobs
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.adapter_files import adapter_config, adapter_weights
from rosd_fast.model.adapters import choose_trainable
from rosd_fast.model.layouts import hidden_states
from rosd_fast.model.load import LoadedModel, load_model
from rosd_fast.pipeline import sample_and_annotate
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.quickstart.tasks import load_split
from rosd_fast.reflection.grammar import verbatim_grammar
from rosd_fast.report.metrics import read_metrics
from rosd_fast.rollout.sample import problem_prompt
from rosd_fast.run import Run, open_run
from rosd_fast.train import start, train, train_on
from rosd_fast.types import Generation, GenerationRequest, PackedSequences, SamplingParams
from tests.engines.sglang.fake_sglang import ENGINE, LIMITS, WATCH
from tests.launch import module_command
from tests.teacher_folder import save_teacher

pytestmark = pytest.mark.sglang
PYTHON = os.environ.get("ROSD_SGLANG_PYTHON", "")
POOL = "--max-total-tokens 16384"
MAX_GAP_NATS = 1e-3  # nats, between two float32 implementations


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("quickstart", dtype="float32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The (address, key) of a running server, for tests that do not disturb it."""
    if not PYTHON:
        pytest.fail("ROSD_SGLANG_PYTHON is not set; run these tests with `make sglang`")
    spec = ServerSpec(
        python=Path(PYTHON),
        model_folder=MODEL_DIR,
        dtype="float32",
        on_cpu=True,
        args=tuple(POOL.split()),
        start_timeout_s=300,
    )
    managed = ManagedServer(spec, tmp_path_factory.mktemp("server"))

    async def start() -> tuple[str, str]:
        await managed.start()
        assert managed.endpoint is not None
        await managed.endpoint.close()  # its session belongs to this event loop
        return managed.endpoint.url, managed.endpoint._headers["Authorization"].split()[1]

    yield asyncio.run(start())
    asyncio.run(managed.stop())


def prompt_of(problem: Any, model: Any) -> tuple[int, ...]:
    """The student's prompt."""
    return problem_prompt(problem, make_chats(ChatConfig(), model.tokenizer).student, 256)


def make_engine(
    server: tuple[str, str], model: LoadedModel, folder: Path, **options: Any
) -> SglangEngine:
    url, key = server
    return SglangEngine(
        [ServerHandle(Endpoint(url, api_key=key), name=url, **WATCH)],
        **ENGINE
        | {
            "sync": DiskSync(folder / "weights", MODEL_DIR),
            "vocab_size": model.model.config.vocab_size,
            "context_length": model.context_length,
            "weight_check_ids": model.tokenizer.encode("3 + 4 = 7. 7 - 2 = 5."),
            "expected_logprobs": lambda ids: token_logprobs(model.model, ids),
            "max_logprob_gap": MAX_GAP_NATS,
        }
        | options,
    )


def use(engine: SglangEngine, model: LoadedModel, test: Coroutine[Any, Any, Any]) -> Any:
    """Load the model's weights into the server, run `test`, close the engine."""

    async def run() -> Any:
        try:
            await engine.load_weights(model.model.state_dict(), version=0)
            return await test
        finally:
            test.close()  # in case it was not awaited
            await engine.close()

    return asyncio.run(run())


def make_requests(model: LoadedModel, count: int, **options: Any) -> list[GenerationRequest]:
    params = {"max_new_tokens": 48, "stop_token_ids": model.stop_token_ids} | options
    n = params.pop("n", 1)
    return [
        GenerationRequest(
            id=f"step1/{problem.id}",
            prompt_ids=prompt_of(problem, model),
            params=SamplingParams(**params),
            n=n,
            affinity=problem.id,
        )
        for problem in load_split("train")[:count]
    ]


def assert_policy(model: LoadedModel, requests: list[GenerationRequest], done: list[Any]) -> None:
    """Assert that all completions are there, with the log-probabilities of `model`."""
    prompts = {request.id: request.prompt_ids for request in requests}
    assert [(g.request_id, g.index) for g in done] == [
        (request.id, index) for request in requests for index in range(request.n)
    ]
    for generation in done:
        prompt = prompts[generation.request_id]
        ids = [*prompt, *generation.completion_ids]
        expected = token_logprobs(model.model, ids)[len(prompt) - 1 :]
        assert expected == pytest.approx(list(generation.logprobs), abs=MAX_GAP_NATS)


def test_greedy_tokens_are_those_of_the_local_engine(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    requests = make_requests(model, 24, temperature=0.0)
    engine = make_engine(server, model, tmp_path)
    served = use(engine, model, engine.generate(requests))
    local = asyncio.run(LocalEngine(model.model).generate(requests))
    for a, b in zip(served, local, strict=True):
        assert a.completion_ids == b.completion_ids and a.finish_reason == b.finish_reason
        assert list(a.logprobs) == pytest.approx(list(b.logprobs), abs=MAX_GAP_NATS)


def test_groups_share_their_prompt_in_the_cache(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    requests = make_requests(model, 16, n=8)
    engine = make_engine(server, model, tmp_path)
    done = use(engine, model, engine.generate(requests))
    assert_policy(model, requests, done)
    metrics = engine.take_metrics()
    assert metrics["rollout/cached_frac"] >= 0.9 * metrics["rollout/shareable_frac"] > 0.7


def test_log_probabilities_are_those_at_the_sampling_temperature(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    requests = make_requests(model, 4, temperature=0.5, n=2)
    engine = make_engine(server, model, tmp_path)
    done: list[Generation] = use(engine, model, engine.generate(requests))
    for generation in done:
        prompt = next(r.prompt_ids for r in requests if r.id == generation.request_id)
        ids = torch.tensor([[*prompt, *generation.completion_ids]])
        with torch.no_grad():
            logits = model.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.5
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert expected.tolist() == pytest.approx(list(generation.logprobs), abs=MAX_GAP_NATS)


def test_reflections_quote_only_the_rollout(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    text = 'First, 3 + 4 = 7. Then "7" - 2 = 6\\ {and} so. <answer>6</answer> </error_quote> end'
    grammar = verbatim_grammar(text, min_words=3, max_tokens=96)
    requests = [
        GenerationRequest(
            id=request.id, prompt_ids=request.prompt_ids, params=request.params, n=4,
            grammar=grammar,
        )
        for request in make_requests(model, 4, max_new_tokens=96)
    ]  # fmt: skip
    engine = make_engine(server, model, tmp_path)
    done: list[Generation] = use(engine, model, engine.generate(requests))
    for generation in done:
        said = str(
            model.tokenizer.decode(list(generation.completion_ids), skip_special_tokens=True)
        )
        quote = said.split("</error_quote>")[0]
        assert quote in text and len(quote.split()) >= 3
        assert generation.finish_reason == "stop"
        # It ends at its tag or at the token limit: 96, less the tokens of tags and quote.
        explanation = said.split("<explanation>")[1]
        assert explanation.endswith("</explanation>") or len(generation.completion_ids) > 39


def test_an_invalid_grammar_fails_alone(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    good, other = make_requests(model, 2)
    wrong = GenerationRequest(
        id="wrong", prompt_ids=good.prompt_ids, params=good.params, grammar="start: foo("
    )
    engine = make_engine(server, model, tmp_path)

    async def test() -> list[Generation]:
        tasks = [asyncio.create_task(engine.generate([r])) for r in (good, wrong, other)]
        with pytest.raises(ValueError, match=r"request wrong: .*grammar"):
            await tasks[1]
        return [*await tasks[0], *await tasks[2]]

    assert_policy(model, [good, other], use(engine, model, test()))


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_the_server_loads_new_weights_and_flushes_its_cache(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path, sync: str
) -> None:
    requests = make_requests(model, 4, n=2)
    options = {} if sync == "disk" else {"sync": DistributedSync(bucket_bytes=2**20)}
    engine = make_engine(server, model, tmp_path, **options)

    async def test() -> None:
        assert_policy(model, requests, await engine.generate(requests))
        await change(model, engine, version=1)
        try:
            done = await engine.generate(requests)
            assert {generation.policy_version for generation in done} == {1}
            assert_policy(model, requests, done)
        finally:
            restore(model)

    use(engine, model, test())


async def change(model: LoadedModel, engine: SglangEngine, *, version: int) -> None:
    """Change the weights of the trainer's model and load them into the server."""
    torch.manual_seed(version)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    await engine.load_weights(model.model.state_dict(), version=version)


def restore(model: LoadedModel) -> None:
    fresh = load_model("quickstart", dtype="float32", device=torch.device("cpu"))
    model.model.load_state_dict(fresh.model.state_dict())


def test_a_server_with_other_weights_than_the_trainers_is_noticed(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    def wrong(ids: Any) -> list[float]:
        return [value + 0.1 for value in token_logprobs(model.model, ids)]

    engine = make_engine(server, model, tmp_path, expected_logprobs=wrong)
    with pytest.raises(RunFailed, match=r"log-probability -.* and the trainer -.*max_logprob_gap"):
        use(engine, model, engine.generate([]))


def test_two_trainers_on_one_server_are_noticed(
    server: tuple[str, str], model: LoadedModel, tmp_path: Path
) -> None:
    first = make_engine(server, model, tmp_path / "first")
    second = make_engine(server, model, tmp_path / "second")
    request = make_requests(model, 1)

    async def test() -> None:
        await first.load_weights(model.model.state_dict(), version=3)
        await second.load_weights(model.model.state_dict(), version=5)
        try:
            with pytest.raises(RunFailed, match="another trainer has loaded its weights"):
                await first.generate(request)
            assert_policy(model, request, await second.generate(request))
        finally:
            await first.close()
            await second.close()

    asyncio.run(test())


def small(out: Path, **changes: Any) -> Config:
    options: dict[str, Any] = {
        "steps": 3,
        "name": "run",
        "out": str(out),
        "sample.problems_per_step": 8,
        "sample.group_size": 4,
        "eval.problems": 6,
        "eval.samples": 1,
        "engine.kind": "sglang",
        "engine.python": PYTHON,
        "engine.server_args": POOL,
    }
    return apply_args(
        load_preset("quickstart"), options | {k.replace("__", "."): v for k, v in changes.items()}
    )


def children_of(pid: int) -> list[int]:
    """The ids of all descendants of a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in path.read_text().split()] if path.exists() else []
    return children + [below for child in children for below in children_of(child)]


def scheduler(server: ManagedServer) -> int:
    """The id of the process that holds the model."""
    assert server._process is not None
    for pid in children_of(server._process.pid):
        if "scheduler" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise AssertionError("no scheduler")


@pytest.mark.parametrize(
    ("harm", "sync"),
    [
        pytest.param(lambda pid: os.kill(pid, signal.SIGKILL), "distributed", id="dies"),
        pytest.param(lambda pid: os.kill(pid, signal.SIGSTOP), "disk", id="hangs"),
    ],
)
def test_a_server_that_fails_in_mid_step_is_restarted(
    model: LoadedModel, tmp_path: Path, harm: Callable[[int], None], sync: str
) -> None:
    """All completions are there, from the current weights, and no process is left."""
    config = small(
        tmp_path,
        engine__health_every_s=2.0,
        engine__health_timeout_s=8.0,
        engine__sync=sync,
    )
    requests = make_requests(model, 24, n=4)
    notes: list[str] = []
    engine = open_engine(
        config,
        model,
        tmp_path,
        weight_check_ids=model.tokenizer.encode("3 + 4 = 7."),
        expected_logprobs=lambda ids: token_logprobs(model.model, ids),
        note=notes.append,
    )
    assert isinstance(engine, SglangEngine)
    processes: list[int] = []

    async def test() -> None:
        managed = engine.servers[0].managed
        assert managed is not None and managed._process is not None
        await engine.generate(requests[:2])
        await change(model, engine, version=1)
        processes.extend(children_of(managed._process.pid))
        in_flight = asyncio.create_task(engine.generate(requests))
        await asyncio.sleep(0.3)
        harm(scheduler(managed))
        done = await in_flight
        assert managed.num_starts >= 2  # more if a busy server on a slow machine counts as hung
        assert {generation.policy_version for generation in done} == {1}
        assert_policy(model, requests, done)
        processes.extend(children_of(managed._process.pid))
        assert engine.take_metrics()["rollout/num_retries"] >= 1
        assert any("restarted" in note for note in notes)

    try:
        use(engine, model, test())
    finally:
        restore(model)
    assert processes
    for _ in range(300):
        left = [pid for pid in processes if Path(f"/proc/{pid}/cmdline").exists()]
        if not left:
            break
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize("rank", [0, 8], ids=["weights", "adapters"])
def test_training_learns_from_what_the_server_samples(tmp_path: Path, rank: int) -> None:
    """Before each of three steps the server's greedy answers equal those of the trainer's model."""
    config = small(tmp_path, lora__rank=rank)

    async def steps(run: Run) -> None:
        inputs, model = run.inputs, run.inputs.model
        local = LocalEngine(model.model)
        async with run.open_engines() as engines:
            await engines.student.load_weights(run.learners.weights(), version=0)
            for step in range(1, 4):
                greedy = [
                    GenerationRequest(
                        id=f"greedy{step}/{problem.id}",
                        prompt_ids=prompt_of(problem, model),
                        params=SamplingParams(
                            max_new_tokens=48,
                            temperature=0.0,
                            stop_token_ids=model.stop_token_ids,
                        ),
                    )
                    for problem in inputs.stream.batch(step)
                ]
                theirs = await engines.student.generate(greedy)
                ours = await local.generate(greedy)
                for a, b in zip(theirs, ours, strict=True):
                    assert a.completion_ids == b.completion_ids
                    assert list(a.logprobs) == pytest.approx(list(b.logprobs), abs=MAX_GAP_NATS)
                sampled = await sample_and_annotate(inputs, engines, step, run.progress)
                assert all(
                    rollout.policy_version == step - 1
                    for group in sampled.groups
                    for rollout in group.rollouts
                )
                metrics = await train_on(run, engines, step, sampled)
                assert metrics["loss/logprob_gap_max"] < MAX_GAP_NATS
                assert metrics["reflect/found_frac"] == 1.0
                run.finish_step(step, metrics)

    with open_run(config) as run:
        asyncio.run(steps(run))


PINNED = """
import torch

def unpinned(make):
    return lambda *args, **options: make(*args, **{**options, "pin_memory": False})

for name in ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like"):
    setattr(torch, name, unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *args: self
"""


@pytest.fixture
def python_without_pinned_memory(tmp_path: Path) -> Path:
    """An interpreter with sglang in which memory is never pinned, which fails without a GPU."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PINNED)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {PYTHON} "$@"\n')
    script.chmod(0o755)
    return script


def test_adapters_alone_reach_a_server(python_without_pinned_memory: Path, tmp_path: Path) -> None:
    """Two versions, each with the trainer's log-probabilities, and again after a restart."""
    model = load_model("quickstart", dtype="float32", device=torch.device("cpu"))
    choose_trainable(model.model, lora=LoraConfig(rank=8), trainable="", seed=0)
    config = adapter_config(model.model)
    torch_lora = ("--lora-backend", "torch_native")
    spec = ServerSpec(
        python=python_without_pinned_memory,
        model_folder=MODEL_DIR,
        dtype="float32",
        on_cpu=True,
        args=(*POOL.split(), *server_args(config), *torch_lora),
        start_timeout_s=300,
    )
    managed = ManagedServer(spec, tmp_path / "server")
    requests = make_requests(model, 4, n=2)

    async def test() -> None:
        options: dict[str, Any] = ENGINE | {
            "vocab_size": model.model.config.vocab_size,
            "context_length": model.context_length,
            "weight_check_ids": model.tokenizer.encode("3 + 4 = 7. 7 - 2 = 5."),
            "expected_logprobs": lambda ids: token_logprobs(model.model, ids),
            "max_logprob_gap": MAX_GAP_NATS,
        }
        sync = AdapterSync(tmp_path / "weights", config)
        engine = SglangEngine([ServerHandle(managed, name="s", **WATCH)], sync=sync, **options)
        try:
            for version in range(3):
                with torch.no_grad():
                    for name, parameter in model.model.named_parameters():
                        if "lora_B" in name:
                            parameter.normal_(std=0.03)
                await engine.load_weights(adapter_weights(model.model), version=version)
                assert_policy(model, requests, await engine.generate(requests))
            assert managed.num_starts == 1
            os.kill(scheduler(managed), signal.SIGKILL)
            assert_policy(model, requests, await engine.generate(requests))
            assert managed.num_starts == 2
        finally:
            await engine.close()

    asyncio.run(test())


def test_adapters_alone_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.sync = adapter: needs a GPU"):
        train(small(tmp_path, engine__sync="adapter", lora__rank=4))
    assert not (tmp_path / "run").exists()


def test_one_step_ahead(tmp_path: Path) -> None:
    run = train(small(tmp_path, engine__one_step_ahead=True))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss/divergence" in row]
    assert [row["rollout/policy_lag_mean"] for row in rows] == [0.0, 1.0, 1.0]
    assert not list((run / "engine" / "weights").iterdir())


@pytest.mark.parametrize("ahead", [False, True])
def test_evaluation_while_the_next_step_runs(ahead: bool, tmp_path: Path) -> None:
    """Every step has its evaluation, of its own weights: the engine refuses others."""
    options = {"eval__every": 1, "eval__overlap": True, "engine__one_step_ahead": ahead}
    run = train(small(tmp_path, checkpoint__every=1, checkpoint__keep_last=3, **options))
    rows = read_metrics(run / "metrics.jsonl")
    evaluated = {
        row["step"]: row["eval/dev/accuracy"] for row in rows if "eval/dev/accuracy" in row
    }
    assert list(evaluated) == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "loss/divergence" in row] == [1, 2, 3]
    for step in (1, 2, 3):
        path = run / "checkpoints" / f"step_{step:06d}" / "trainer_state.json"
        assert json.loads(path.read_text())["dev_accuracy"] == evaluated[step]


def test_colocation_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.colocated: needs a GPU"):
        train(small(tmp_path, engine__colocated=True))
    assert not (tmp_path / "run").exists()


def with_teacher(out: Path, **changes: Any) -> Config:
    options = {"engine__kind": "local", "engine__server_args": "", "teacher__backend": "sglang"}
    return small(out, **options, teacher__server_args=POOL, **changes)


def test_a_teacher_on_a_server_gives_the_losses_of_one_in_the_trainer(tmp_path: Path) -> None:
    """With the same rollouts and reflections, also when its server is killed in between."""

    async def steps(run: Run) -> list[dict[str, float]]:
        rows = []
        async with run.open_engines() as engines:
            assert engines.teacher_server is not None
            await start(run, engines)
            managed = engines.teacher_server.servers[0].managed
            assert managed is not None and managed.num_starts == 1
            for step in range(1, 4):
                if step == 2:
                    os.kill(scheduler(managed), signal.SIGKILL)
                sampled = await sample_and_annotate(run.inputs, engines, step, run.progress)
                rows.append(await train_on(run, engines, step, sampled))
                run.finish_step(step, rows[-1])
            assert managed.num_starts == 2
        return rows

    with open_run(with_teacher(tmp_path / "far")) as run:
        far = asyncio.run(steps(run))
    near = train(small(tmp_path / "near", engine__kind="local"))
    rows = [row for row in read_metrics(near / "metrics.jsonl") if "loss/divergence" in row]
    assert len(rows) == len(far) == 3
    for ours, theirs in zip(rows, far, strict=True):
        for name in ("loss/divergence", "loss/teacher_entropy", "loss/student_entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), name
        assert theirs["loss/num_distilled_tokens"] == ours["loss/num_distilled_tokens"] > 0


def test_a_teacher_on_a_server_teaches_two_ranks(tmp_path: Path) -> None:
    """Rank 0 requests the states and scatters them; the losses equal those of one local rank."""
    file = tmp_path / "far.toml"
    file.write_text(to_toml(with_teacher(tmp_path, name="far")))
    done = subprocess.run(
        module_command(2, "rosd_fast", "train", "--config", file),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    near = train(small(tmp_path, name="near", engine__kind="local"))
    runs = [read_metrics(run / "metrics.jsonl")[1:] for run in (near, tmp_path / "far")]
    assert len(runs[0]) == len(runs[1]) == 3
    for ours, theirs in zip(*runs, strict=True):
        for name in ("loss/divergence", "loss/teacher_entropy", "loss/student_entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), name
        assert theirs["loss/num_distilled_tokens"] == ours["loss/num_distilled_tokens"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_model_on_a_server_teaches_as_one_in_the_trainer(
    tmp_path: Path, ranks: int
) -> None:
    """Wider and deeper than the student, with more rows of the vocabulary."""
    teacher = save_teacher(tmp_path / "teacher", rows=16, hidden_size=64, head_dim=32)
    changes = {"method": "opd", "teacher__model": teacher}
    file = tmp_path / "far.toml"
    file.write_text(to_toml(with_teacher(tmp_path, name="far", **changes)))
    done = subprocess.run(
        module_command(ranks, "rosd_fast", "train", "--config", file),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    near = train(small(tmp_path, name="near", engine__kind="local", **changes))
    runs = [read_metrics(run / "metrics.jsonl")[1:] for run in (near, tmp_path / "far")]
    assert len(runs[0]) == len(runs[1]) == 3
    for ours, theirs in zip(*runs, strict=True):
        for name in ("loss/divergence", "loss/teacher_entropy", "loss/student_entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), name
        assert theirs["loss/num_distilled_tokens"] == ours["loss/num_distilled_tokens"] > 0


def test_states_are_those_of_the_model_from_any_position(
    model: LoadedModel, tmp_path: Path
) -> None:
    """Also when the cache holds all but the last token, and concurrently.

    They come as files in memory: the answers themselves are short.
    """
    config = with_teacher(tmp_path)
    texts = [problem.prompt for problem in load_split("train")[:6]]
    teacher = open_sglang_teacher(config, model, tmp_path, note=print)
    assert teacher is not None

    async def test() -> None:
        sequences = [model.tokenizer.encode(text) for text in texts]
        cases = [
            (ids, first) for ids in sequences for first in (0, len(ids) // 2, len(ids) - 1) * 2
        ]
        received = await asyncio.gather(*(teacher.score(ids, first=first) for ids, first in cases))
        for (ids, first), states in zip(cases, received, strict=True):
            packed = PackedSequences(
                input_ids=torch.tensor(ids),
                position_ids=torch.arange(len(ids)),
                cu_seqlens=(0, len(ids)),
                gather=torch.arange(first, len(ids)),
            )
            with torch.no_grad():
                expected = hidden_states(model.model, packed)[first:]
            torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
        assert teacher.servers[0].num_bytes < 4000 * (len(cases) + 1)
        assert teacher._states_folder is not None
        assert not list(teacher._states_folder.iterdir())

    async def run() -> None:
        try:
            await test()
        finally:
            await teacher.close()

    asyncio.run(run())


def test_a_server_that_returns_no_states_is_refused(
    server: tuple[str, str], model: LoadedModel
) -> None:
    """The error says how to start it."""
    url, key = server
    limits: dict[str, Any] = LIMITS | {"max_failures": 2}
    teacher = SglangTeacher(
        [ServerHandle(Endpoint(url, api_key=key), name=url, **WATCH)],
        hidden_size=model.model.config.hidden_size,
        note=print,
        **limits,
    )

    async def run() -> None:
        try:
            await teacher.score([1, 2, 3, 4], first=2)
        finally:
            await teacher.close()

    with pytest.raises(RunFailed, match="--return-hidden-states-mode full"):
        asyncio.run(run())


@pytest.mark.parametrize("own", [False, True])
def test_an_evaluation_has_the_accuracy_of_the_local_engine(
    server: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """By address, and on a server that it starts itself. The draws differ, so within the noise."""
    url, key = server
    monkeypatch.setenv("ROSD_SGLANG_API_KEY", key)
    small = ["quickstart", "--problems", "40", "--samples", "8", "--max-new-tokens", "96"]
    engine = (
        ["--engine.python", PYTHON, f"--engine.server-args={POOL}"]
        if own
        else ["--engine.launch", "urls", "--engine.urls", url]
    )
    out = ["--out", str(tmp_path), "--name"]
    assert main(["eval", *small, "--engine.kind", "sglang", *engine, *out, "served"]) == 0
    assert main(["eval", *small, *out, "local", "--against", str(tmp_path / "served")]) == 0
    found = json.loads((tmp_path / "local" / "result.json").read_text())
    difference = found["against"]["difference"]["total"]["accuracy"]
    assert difference["low"] < 0 < difference["high"] or abs(difference["value"]) < 0.08
    assert difference["high"] - difference["low"] < 0.3
    answered = found["against"]["total"]["answered_frac"]["value"]
    assert answered > 0.95
