"""Models of several families on a real SGLang: the trainer's log-probabilities after each update.

Each is a tiny random model in the layout of its hub files. `docs/sglang.md` names the families that
the CPU build of SGLang cannot serve.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rosd_fast.engines.sglang.broadcast_sync import DistributedSync
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import ManagedServer, ServerSpec
from rosd_fast.engines.sglang.weight_sync import DiskSync
from rosd_fast.engines.weight_check import token_logprobs
from rosd_fast.model.adapters import merged_weights
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.load import LoadedModel, load_model
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.types import GenerationRequest, SamplingParams
from tests.engines.sglang.fake_sglang import ENGINE, WATCH
from tests.engines.sglang.served_models import SERVED, save_served
from tests.engines.sglang.test_real_server import MAX_GAP_NATS, POOL, PYTHON

pytestmark = pytest.mark.sglang
FIRST = ("Qwen3-MoE", "Gemma 3")  # the others with -m "sglang and slow"
PROMPTS = [list(range(40, 40 + length)) for length in (3, 17, 40)]


@torch.no_grad()
def change(model: LoadedModel, seed: int) -> None:
    """Change all weights, as a step of training would."""
    torch.manual_seed(seed)
    for parameter in model.model.parameters():
        parameter += 0.05 * parameter.std(correction=0) * torch.randn_like(parameter)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in SERVED],
)
def test_log_probabilities_are_the_trainers_after_updates(family: str, tmp_path: Path) -> None:
    """By files first, then by broadcast."""
    if not PYTHON:
        pytest.fail("ROSD_SGLANG_PYTHON is not set; run these tests with `make sglang`")
    folder = tmp_path / "model"
    save_served(folder, family, AutoTokenizer.from_pretrained(MODEL_DIR))
    model = load_model(str(folder), dtype="float32", device=torch.device("cpu"))
    spec = ServerSpec(
        python=Path(PYTHON),
        model_folder=folder,
        dtype="float32",
        on_cpu=True,
        args=tuple(POOL.split()),
        start_timeout_s=600,
    )
    managed = ManagedServer(spec, tmp_path / "server")
    requests = [
        GenerationRequest(
            id=f"prompt{index}",
            prompt_ids=tuple(ids),
            params=SamplingParams(max_new_tokens=24, stop_token_ids=model.stop_token_ids),
            n=2,
            affinity="",
        )
        for index, ids in enumerate(PROMPTS)
    ]

    async def one_version(engine: SglangEngine, version: int) -> float:
        """Load the weights and return the largest difference of a sampled token, in nats."""
        weights = file_weights(model.model, merged_weights(model.model))
        await engine.load_weights(weights, version=version)
        gaps = []
        for generation in await engine.generate(requests):
            prompt = PROMPTS[int(generation.request_id.removeprefix("prompt"))]
            ids = [*prompt, *generation.completion_ids]
            expected = token_logprobs(model.model, ids)[len(prompt) - 1 :]
            assert len(expected) == len(generation.logprobs) > 0
            gaps += [abs(a - b) for a, b in zip(expected, generation.logprobs, strict=True)]
        return max(gaps)

    async def test() -> None:
        handle = ServerHandle(managed, name="s", **WATCH)
        options: dict[str, Any] = ENGINE | {
            "vocab_size": model.model.config.get_text_config().vocab_size,
            "context_length": model.context_length,
            "weight_check_ids": list(range(30, 60)),
            "expected_logprobs": lambda ids: token_logprobs(model.model, ids),
            "max_logprob_gap": MAX_GAP_NATS,
        }
        files = SglangEngine([handle], sync=DiskSync(tmp_path / "weights", folder), **options)
        memory = SglangEngine([handle], sync=DistributedSync(bucket_bytes=2**18), **options)
        try:
            gaps = [await one_version(files, 0)]
            change(model, 1)
            gaps.append(await one_version(files, 1))
            change(model, 2)
            gaps.append(await one_version(memory, 2))
        finally:
            await files.close()
            await memory.close()
        print(f"{family}: largest differences {gaps}")
        assert max(gaps) < MAX_GAP_NATS

    asyncio.run(test())
