"""Each way to run a model, against plain forward passes without cache, padding or batching."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rosd_fast.config import Config
from rosd_fast.engines.factory import open_engine
from rosd_fast.engines.local import decode, kv_cache, recompute
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.local.forward import NextToken
from rosd_fast.engines.local.kv_cache import RowCache
from rosd_fast.engines.local.row_states import RowStates
from rosd_fast.errors import UserError
from rosd_fast.types import Generation, GenerationRequest, SamplingParams
from tests import families

STOP = (5, 9, 11)
SPARSE: dict[str, Any] = {
    "num_key_value_heads": families.SHAPE["num_attention_heads"],
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 16,  # a token whose heads all give it a score of 0 would tie with others
    "index_head_dim": 8,
    "index_topk": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
WAYS = {
    # ALiBi, of which one model takes the columns of its mask for positions
    **dict.fromkeys(("Bloom", "Falcon (ALiBi)", "Mpt"), "padded"),
    **dict.fromkeys(("GPT2", "OPT"), "padded"),  # learned positions
    **dict.fromkeys(("GptOss", "Gemma3n", "DeepseekV3"), "padded"),
    **dict.fromkeys(("Mamba", "Mamba2", "FalconMamba"), "exact"),
    **dict.fromkeys(("Bamba", "Jamba", "FalconH1", "Zamba2", "NemotronH"), "exact"),
    **dict.fromkeys(("Lfm2", "Qwen3Next", "Qwen3_5", "KimiLinear"), "exact"),
    "Llama4": "exact",
    **dict.fromkeys(("RecurrentGemma", "Rwkv", "xLSTM", "MiniMax"), "recompute"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows and moves, prefills come in several passes, and so do recomputed rows."""
    monkeypatch.setattr(decode, "BLOCK", 4)
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 30)
    monkeypatch.setattr(recompute, "PASS_TOKENS", 40)


def tiny(name: str, **changes: Any) -> Any:
    if name not in families.names():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return families.tiny(name, torch.float32, **changes)


def make_request(index: int, *, n: int = 3, max_new_tokens: int = 12) -> GenerationRequest:
    """A request whose prompt has 2 to 11 tokens; two in five share a length."""
    length = (5, 2, 9, 5, 11)[index % 5]
    prompt = tuple((7 * i * (index + 1) + i * i) % 61 for i in range(length))
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=1.3, stop_token_ids=STOP)
    return GenerationRequest(id=f"r{index}", prompt_ids=prompt, n=n, seed=1, params=params)


def generate(engine: LocalEngine, requests: list[GenerationRequest]) -> list[Generation]:
    return asyncio.run(engine.generate(requests))


def assert_logprobs_are_the_models(
    model: Any, requests: list[GenerationRequest], generations: list[Generation]
) -> None:
    prompts = {request.id: request.prompt_ids for request in requests}
    for item in generations:
        prompt = prompts[item.request_id]
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *item.completion_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits.double() / 1.3).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(item.completion_ids)[:, None])[:, 0]
        assert item.logprobs == pytest.approx(expected.tolist(), abs=1e-4), item.request_id


@pytest.mark.parametrize("name", WAYS)
def test_logprobs_are_those_of_a_plain_forward_pass(name: str) -> None:
    model = tiny(name)
    requests = [make_request(index) for index in range(7)]
    engine = LocalEngine(model, max_rows=7)  # rows retire and are replaced
    assert engine.way == WAYS[name]
    generations = generate(engine, requests)
    assert len({len(item.completion_ids) for item in generations}) > 1
    assert_logprobs_are_the_models(model, requests, generations)


@pytest.mark.parametrize("name", ["Bloom", "Qwen3Next", "Mamba2", "Lfm2", "Llama4", "Rwkv"])
def test_samples_depend_only_on_seed_id_and_index(name: str) -> None:
    model = tiny(name)
    requests = [make_request(index, n=4) for index in range(5)]
    together = generate(LocalEngine(model), requests)
    by_key = {(item.request_id, item.index): item.completion_ids for item in together}
    assert len(set(by_key.values())) > 15, "completions should differ from each other"
    alone = [item for request in requests for item in generate(LocalEngine(model), [request])]
    waves = generate(LocalEngine(model, max_rows=5), requests[::-1])
    single = generate(LocalEngine(model, max_rows=1), requests[2:4])
    for item in (*alone, *waves, *single):
        assert item.completion_ids == by_key[item.request_id, item.index]


@pytest.mark.parametrize("config", ["DeepseekV32", "GlmMoeDsa"])
def test_a_sparse_indexer_has_its_keys_in_the_cache(config: str) -> None:
    kind = getattr(transformers, f"{config}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    shape = families.SHAPE | families.IDS | SPARSE
    model: Any = transformers.AutoModelForCausalLM.from_config(kind(**shape)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    requests = [make_request(index) for index in range(5)]
    engine = LocalEngine(model, max_rows=7)
    assert engine.way == "padded"
    assert_logprobs_are_the_models(model, requests, generate(engine, requests))


def test_no_padding_enters_a_recurrent_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are prefilled with those of their own length, and as often as without recurrence."""
    model, prefill, shapes = tiny("Qwen3Next"), NextToken.prefill, []

    def watched(self: NextToken, cache: RowCache, ids: Tensor, starts: Tensor) -> Tensor:
        assert not starts.any()
        shapes.append(tuple(ids.shape))
        return prefill(self, cache, ids, starts)

    engine = LocalEngine(model)
    monkeypatch.setattr(NextToken, "prefill", watched)
    generate(engine, [make_request(index) for index in range(5)])
    assert sorted(shapes) == [(1, 2), (1, 9), (1, 11), (2, 5)]


@pytest.mark.parametrize("operation", ["copy", "move", "append"])
def test_a_state_that_does_not_follow_its_row_is_found(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the model is recomputed, and its samples are right all the same."""

    def lost(self: RowStates, *args: Any) -> None:
        if operation == "append" and not self.buffers:
            append(self, *args)

    append = RowStates.append
    model, requests = tiny("Mamba"), [make_request(index) for index in range(4)]
    expected = generate(LocalEngine(model), requests)
    monkeypatch.setattr(RowStates, operation, lost)
    engine = LocalEngine(model)
    assert engine.way == "recompute"
    generations = generate(engine, requests)
    assert [g.completion_ids for g in generations] == [g.completion_ids for g in expected]


def test_a_step_of_a_cached_model_computes_one_token_per_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, shapes = tiny("Bamba"), set()
    engine = LocalEngine(model)
    forward = type(model).forward

    def watched(self: Any, **inputs: Any) -> Any:
        shapes.add(inputs["input_ids"].shape[1])
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", watched)
    generate(engine, [make_request(2)])
    assert shapes == {9, 1}


def test_a_run_says_that_a_model_without_a_cache_is_recomputed(tmp_path: Path) -> None:
    notes: list[str] = []
    for name in ("Rwkv", "Llama"):
        loaded: Any = SimpleNamespace(model=tiny(name), tokenizer=None)
        open_engine(
            Config(),
            loaded,
            tmp_path,
            weight_check_ids=(1,),
            expected_logprobs=lambda ids: [],
            note=notes.append,
        )
    assert notes == [
        "local engine: each token reads its whole row again, which is slow: RwkvForCausalLM has no "
        "cache of transformers' kind"
    ]


def test_a_short_window_is_crossed_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that shows a chunked or sliding layer other columns than it should is found."""
    for name in ("Mistral", "Llama4", "GptOss"):
        config = families.tiny_config(name)
        window = getattr(config, "attention_chunk_size", None) or config.sliding_window
        lengths = list(lengths_of_check(name, monkeypatch))
        assert max(lengths) > window + 4


def lengths_of_check(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    model = tiny(name)
    forward, lengths = type(model).forward, []

    def watched(self: Any, **inputs: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", watched)
    NextToken(model)
    monkeypatch.undo()
    yield from lengths


def test_a_model_that_sees_the_future_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=False
    )
    model = transformers.BertLMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    with pytest.raises(UserError, match=r"BertLMHeadModel: its logits depend on .*Choose a causal"):
        LocalEngine(model)


def test_a_device_that_is_full_chooses_no_slower_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RowCache, "update", full)
    with pytest.raises(torch.OutOfMemoryError):
        NextToken(tiny("Llama"))
