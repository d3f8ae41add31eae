"""Adapters alone on their way to a server: names, folders, restarts, servers that cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from rosd_fast.config import Config
from rosd_fast.engines.factory import check_engine, open_sync
from rosd_fast.engines.sglang.adapter_sync import AdapterSync, server_args
from rosd_fast.engines.sglang.client import Endpoint, Unreachable
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.adapter_files import adapter_config, adapter_weights
from rosd_fast.types import GenerationRequest, SamplingParams
from tests.engines.sglang.fake_sglang import ENGINE, WATCH, FakeSglang
from tests.tiny import mark_trainable, tiny_model

REQUEST = GenerationRequest(
    id="a", prompt_ids=(1, 2), params=SamplingParams(max_new_tokens=8, stop_token_ids=(3,))
)


def adapted_model() -> Any:
    model = tiny_model("Llama", torch.float32)
    mark_trainable(model, Config.model_validate({"lora": {"rank": 3, "targets": "v_proj,q_proj"}}))
    return model


def with_server(
    fake: FakeSglang,
    folder: Path,
    test: Callable[[SglangEngine, Any], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    model = adapted_model()

    async def run() -> None:
        async with fake:
            handle = ServerHandle(Endpoint(fake.url), name=fake.url, **WATCH)
            sync = AdapterSync(folder, adapter_config(model))
            arguments: dict[str, Any] = ENGINE | {"vocab_size": 64, "context_length": 64} | options
            engine = SglangEngine([handle], sync=sync, **arguments)
            try:
                await asyncio.wait_for(test(engine, model), 60)
            finally:
                await engine.close()

    asyncio.run(run())


def lora_server(rank: int | None = 8) -> FakeSglang:
    fake = FakeSglang()
    fake.max_lora_rank = rank
    return fake


def test_each_version_is_an_adapter_that_requests_name(tmp_path: Path) -> None:
    fake = lora_server()

    async def test(engine: SglangEngine, model: Any) -> None:
        for version in range(3):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(1.0)
            await engine.load_weights(adapter_weights(model), version=version)
            folder = tmp_path / f"v{version:06d}"
            assert fake.adapters == {engine.tag: str(folder)}  # the version before is unloaded
            assert [path.name for path in tmp_path.iterdir()] == [folder.name]
            expected = adapter_weights(model)
            found = load_file(folder / "adapter_model.safetensors")
            assert found.keys() == expected.keys() and len(found) == 8
            assert all(torch.equal(found[name], expected[name]) for name in found)
            config: Any = peft.LoraConfig.from_pretrained(str(folder))
            assert (config.r, config.target_modules) == (3, {"q_proj", "v_proj"})
            [generation] = await engine.generate([REQUEST])
            assert generation.policy_version == version
            assert fake.bodies[-1]["lora_path"] == engine.tag == fake.version

    with_server(fake, tmp_path, test)
    assert not list(tmp_path.iterdir())


def test_the_weight_check_names_the_adapter(tmp_path: Path) -> None:
    fake = lora_server()

    async def test(engine: SglangEngine, model: Any) -> None:
        await engine.load_weights(adapter_weights(model), version=0)
        fake.check_logprob = -2.0
        with pytest.raises(RunFailed, match=r"which differ by more than engine\.max_logprob_gap"):
            await engine.load_weights(adapter_weights(model), version=1)

    options = {"weight_check_ids": (1, 2, 3), "max_logprob_gap": 0.1}
    with_server(fake, tmp_path, test, expected_logprobs=lambda ids: [-1.0, -1.0], **options)


def test_a_failed_and_an_interrupted_load_are_repeated(tmp_path: Path) -> None:
    fake, notes = lora_server(), []

    async def test(engine: SglangEngine, model: Any) -> None:
        fake.refuse_weights = 1
        with pytest.raises(RunFailed, match=r"did not load the adapter .*is already loaded"):
            await engine.load_weights(adapter_weights(model), version=0)
        fake.adapters[engine.tag] = "half"  # the server loaded it, and the answer was lost
        await engine.generate([REQUEST])
        assert fake.adapters == {engine.tag: str(tmp_path / "v000000")}

    with_server(fake, tmp_path, test, note=notes.append)
    assert len(notes) == 1


def test_a_restarted_server_gets_the_adapter_again(tmp_path: Path) -> None:
    fake, notes = lora_server(), []

    async def test(engine: SglangEngine, model: Any) -> None:
        await engine.load_weights(adapter_weights(model), version=0)
        fake.adapters.clear()
        fake.version = "default"
        await engine.generate([REQUEST])
        assert fake.adapters == {engine.tag: str(tmp_path / "v000000")}

    with_server(fake, tmp_path, test, note=notes.append)
    assert ["has lost the weights" in note for note in notes] == [True]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_server_without_room_for_the_adapters_is_refused(
    rank: int | None, tmp_path: Path
) -> None:
    async def test(engine: SglangEngine, model: Any) -> None:
        with pytest.raises(RunFailed) as error:
            await engine.load_weights(adapter_weights(model), version=0)
        assert "--enable-lora --max-lora-rank 3 --lora-target-modules q_proj v_proj" in str(
            error.value
        )

    with_server(lora_server(rank), tmp_path, test)


def test_data_parallel_servers_are_refused(tmp_path: Path) -> None:
    fake = lora_server()
    fake.dp_size = 2

    async def test(engine: SglangEngine, model: Any) -> None:
        with pytest.raises(RunFailed, match=r"dp_size 2; set engine\.sync = disk"):
            await engine.load_weights(adapter_weights(model), version=0)

    with_server(fake, tmp_path, test)


def test_the_options_open_it_and_a_cpu_cannot(tmp_path: Path) -> None:
    options = {"kind": "sglang", "sync": "adapter", "launch": "urls", "urls": "http://a"}
    config = Config.model_validate({"engine": options, "lora": {"rank": 3}})
    loaded: Any = type("Loaded", (), {"model": adapted_model()})
    sync = open_sync(config.engine, "quickstart", loaded, tmp_path)
    assert isinstance(sync, AdapterSync) and sync.folder == tmp_path / "engine" / "weights"
    assert server_args(sync.config)[:3] == ("--enable-lora", "--max-lora-rank", "3")
    check_engine(config.engine, config.teacher, "cpu")  # a running server may have a GPU
    with pytest.raises(Unreachable):  # the folder is there, the server is not
        asyncio.run(
            sync.push(ServerHandle(Endpoint("http://127.0.0.1:9"), name="x", **WATCH), "t", 0)
        )


def test_adapters_of_fused_experts_are_refused() -> None:
    """They reach servers merged; adapters of attention alone are accepted."""
    for targets, accepted in (("all-linear", False), ("q_proj,v_proj", True)):
        model = tiny_model("Qwen3Moe", torch.float32, num_experts=4, num_experts_per_tok=2)
        mark_trainable(model, Config.model_validate({"lora": {"rank": 3, "targets": targets}}))
        if accepted:
            assert "--enable-lora" in server_args(adapter_config(model))
        else:
            with pytest.raises(UserError, match=r"fused experts.*Use disk"):
                server_args(adapter_config(model))
