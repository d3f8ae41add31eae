"""Evaluations of a model that servers have loaded by themselves, against fake servers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rosd_fast.cli import main
from rosd_fast.engines.sglang.client import Endpoint
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.served_weights import ServedWeights
from rosd_fast.errors import RunFailed
from rosd_fast.types import GenerationRequest, SamplingParams
from tests.engines.sglang.fake_sglang import ENGINE, WATCH, FakeSglang

SMALL = ("--problems", "5", "--samples", "2", "--max-new-tokens", "64")


@contextmanager
def served(*fakes: FakeSglang) -> Iterator[str]:
    """The addresses of fake servers that run on another thread, as an option."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Callable[[FakeSglang], object]) -> None:
        for fake in fakes:
            asyncio.run_coroutine_threadsafe(work(fake), loop).result()  # type: ignore[arg-type]

    run(lambda fake: fake.__aenter__())
    try:
        yield ",".join(fake.url for fake in fakes)
    finally:
        run(lambda fake: fake.__aexit__())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluate(urls: str, *args: str) -> int:
    engine = ("--engine.kind", "sglang", "--engine.urls", urls)
    return main(["eval", "quickstart", *SMALL, *engine, *args])


def test_a_served_model_is_evaluated_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fakes = FakeSglang(), FakeSglang()
    with served(*fakes) as urls:
        assert evaluate(urls) == 0
    text = capsys.readouterr().out
    assert (
        f"{fakes[0].url}, {fakes[1].url}: serves /models/served; the tokenizer is that of" in text
    )
    asked = [body for fake in fakes for body in fake.bodies]
    assert len(asked) == 5 and {body["sampling_params"]["n"] for body in asked} == {2}
    assert [fake.loaded for fake in fakes] == [[], []]  # no weights were sent, none renamed
    (folder,) = (tmp_path / "evals").iterdir()
    assert folder.name.startswith("served-test-")
    settings = json.loads((folder / "settings.json").read_text())
    model = settings["identity"]["model"]
    assert (model["served"], model["weight_version"]) == ("/models/served", "default")
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 10


def test_servers_of_two_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = FakeSglang(), FakeSglang()
    second.model_path = "/models/other"
    with served(first, second) as urls:
        assert evaluate(urls) == 2
    text = capsys.readouterr().err
    assert f"{second.url}: serves /models/other (default), but {first.url} serves" in text
    assert text.count("\n") == 1


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("http://127.0.0.1:1") == 2
    text = capsys.readouterr().err
    assert "engine.urls: " in text and text.count("\n") == 1
    with served(FakeSglang()) as urls:
        assert evaluate(urls, "--against", "smollm2") == 2
    text = capsys.readouterr().err
    assert "--against smollm2: the servers serve one model. Evaluate the other one" in text


def test_weights_that_change_end_the_evaluation() -> None:
    async def run() -> None:
        async with FakeSglang() as fake:
            engine = SglangEngine(
                [ServerHandle(Endpoint(fake.url), name=fake.url, **WATCH)],
                **ENGINE | {"sync": ServedWeights(), "vocab_size": 50, "context_length": 64},
            )
            try:
                await engine.generate([request("a")])
                fake.version = "default"
                await engine.generate([request("b")])
                fake.version = "0a1b2c3d-7"  # of a trainer
                await engine.generate([request("c")])
            finally:
                await engine.close()

    with pytest.raises(RunFailed, match=r"another trainer .*0a1b2c3d-7, ours are default"):
        asyncio.run(run())


def request(name: str) -> GenerationRequest:
    params = SamplingParams(max_new_tokens=8, stop_token_ids=(3,))
    return GenerationRequest(id=name, prompt_ids=(1, 2, 3), params=params)
