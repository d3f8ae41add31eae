"""The local engine against plain forward passes without cache, padding or batching."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rosd_fast.engines.local import decode, kv_cache
from rosd_fast.engines.local import engine as engine_module
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.local.forward import NextToken
from rosd_fast.errors import UserError
from rosd_fast.model.attention import PACKED
from rosd_fast.model.layouts import packed_forward
from rosd_fast.types import Generation, GenerationRequest, SamplingParams

VOCAB, CONTEXT = 61, 96
STOP = (5, 9, 11)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # large, so that the next token depends on what came before
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 6}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),  # soft caps, so eager attention
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | {"num_hidden_layers": 7}),
}


def build(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    model, config, extra = ARCHITECTURES[name]
    torch.manual_seed(seed)
    options = SHAPE | extra | overrides
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def make_request(
    index: int, *, length: int | None = None, n: int = 3, seed: int = 1, **params: Any
) -> GenerationRequest:
    """A request with a different prompt per index; without `length`, lengths differ too."""
    length = length or 2 + 5 * index % 13
    prompt = tuple((7 * i * (index + 1) + i * i) % VOCAB for i in range(length))
    options = {"max_new_tokens": 25, "stop_token_ids": STOP} | params
    return GenerationRequest(
        id=f"r{index}", prompt_ids=prompt, n=n, seed=seed, params=SamplingParams(**options)
    )


def generate(engine: LocalEngine, requests: Sequence[GenerationRequest]) -> list[Generation]:
    return asyncio.run(engine.generate(requests))


def plain_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Logits [len(completion), V] that predict the completion, from one plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].double()


def assert_logprobs_are_the_models(
    model: Any, requests: Sequence[GenerationRequest], generations: Sequence[Generation]
) -> None:
    prompts = {request.id: request for request in requests}
    for item in generations:
        request = prompts[item.request_id]
        logits = plain_logits(model, request.prompt_ids, item.completion_ids)
        logprobs = (logits / (request.params.temperature or 1.0)).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(item.completion_ids)[:, None])[:, 0]
        difference = (expected - torch.tensor(item.logprobs).double()).abs()
        worst = int(difference.argmax())
        assert difference[worst] < 1e-5, f"{item.request_id}/{item.index}, token {worst}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_are_those_of_a_plain_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With small blocks and few rows the cache grows and moves, and rows retire and are replaced.
    monkeypatch.setattr(decode, "BLOCK", 4)
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 30)
    model = build(name)
    requests = [make_request(index, temperature=1.5) for index in range(8)]
    generations = generate(LocalEngine(model, max_rows=7), requests)
    assert [(g.request_id, g.index) for g in generations] == [
        (f"r{index}", sample) for index in range(8) for sample in range(3)
    ]
    lengths = {len(item.completion_ids) for item in generations}
    assert len(lengths) > 4, "the rows should have finished at different times"
    assert max(lengths) > 12, "some rows should have run beyond the sliding window"
    assert_logprobs_are_the_models(model, requests, generations)


def test_bfloat16_works() -> None:
    model = build("llama").to(torch.bfloat16)
    requests = [make_request(index) for index in range(4)]
    generations = generate(LocalEngine(model), requests)
    for item in generations:
        logits = plain_logits(
            model, requests[int(item.request_id[1:])].prompt_ids, item.completion_ids
        )
        expected = logits.log_softmax(-1).gather(1, torch.tensor(item.completion_ids)[:, None])[
            :, 0
        ]
        assert (expected - torch.tensor(item.logprobs)).abs().mean() < 0.1


def test_prompts_of_one_length_need_no_mask(llama: Any) -> None:
    requests = [make_request(index, length=6) for index in range(3)]
    assert_logprobs_are_the_models(llama, requests, generate(LocalEngine(llama), requests))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_greedy_is_the_argmax_step_by_step(name: str) -> None:
    model = build(name)
    requests = [make_request(index, n=1, temperature=0.0) for index in range(5)]
    generations = generate(LocalEngine(model), requests)
    for request, item in zip(requests, generations, strict=True):
        completion: list[int] = []
        while len(completion) < 25 and not (completion and completion[-1] in STOP):
            logits = plain_logits(model, request.prompt_ids, [*completion, 0])
            completion.append(int(logits[-1].argmax()))
        assert list(item.completion_ids) == completion
    assert_logprobs_are_the_models(model, requests, generations)  # those at temperature 1


def test_first_tokens_follow_the_models_distribution(llama: Any) -> None:
    num, params = 4000, {"max_new_tokens": 1, "temperature": 1.3}
    request = make_request(2, n=num, **params)
    generations = generate(LocalEngine(llama, max_rows=512), [request])
    counts = torch.bincount(
        torch.tensor([g.completion_ids[0] for g in generations]), minlength=VOCAB
    )
    expected = (plain_logits(llama, request.prompt_ids, [0])[0] / 1.3).softmax(0) * num
    likely = expected >= 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    degrees = int(likely.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    assert len({g.index for g in generations}) == num


def test_top_k_and_top_p_cut_the_tail_and_renormalize(llama: Any) -> None:
    requests = [
        make_request(0, n=40, top_k=3, max_new_tokens=4),
        make_request(1, n=40, top_p=0.6, max_new_tokens=4),
        make_request(2, n=40, max_new_tokens=4),
    ]
    generations = generate(LocalEngine(llama), requests)
    for item in generations:
        request = requests[int(item.request_id[1:])]
        logits = plain_logits(llama, request.prompt_ids, item.completion_ids)
        for row, token, logprob in zip(logits, item.completion_ids, item.logprobs, strict=True):
            probs, ids = row.softmax(0).sort(descending=True)
            kept = torch.ones(VOCAB, dtype=torch.bool)
            if item.request_id == "r0":
                kept = torch.arange(VOCAB) < 3
            if item.request_id == "r1":
                kept = probs.cumsum(0) - probs < 0.6
            rank = int((ids == token).nonzero())
            assert kept[rank]
            assert logprob == pytest.approx(
                float((probs[rank] / probs[kept].sum()).log()), abs=1e-5
            )


def test_samples_depend_only_on_seed_id_and_index(llama: Any) -> None:
    requests = [make_request(index, n=4) for index in range(6)]
    together = generate(LocalEngine(llama), requests)
    by_key = {(g.request_id, g.index): g.completion_ids for g in together}
    assert len(set(by_key.values())) > 20, "completions should differ from each other"

    alone = [g for request in requests for g in generate(LocalEngine(llama), [request])]
    waves = generate(LocalEngine(llama, max_rows=5), requests[::-1])
    single = generate(LocalEngine(llama, max_rows=1), requests[2:4])
    for item in (*alone, *waves, *single):
        assert item.completion_ids == by_key[item.request_id, item.index]
    fewer = generate(LocalEngine(llama), [make_request(3, n=2)])
    assert [g.completion_ids for g in fewer] == [by_key["r3", 0], by_key["r3", 1]]
    other = generate(LocalEngine(llama), [make_request(3, n=4, seed=2)])
    assert not {g.completion_ids for g in other} & set(by_key.values())


def test_stop_tokens_end_a_completion_and_belong_to_it(llama: Any) -> None:
    requests = [
        make_request(0, n=20),
        make_request(1, n=20, stop_token_ids=(7, VOCAB + 3)),
        make_request(2, n=20, stop_token_ids=(), max_new_tokens=9),
    ]
    seen = set()
    for item in generate(LocalEngine(llama), requests):
        params = requests[int(item.request_id[1:])].params
        stop, limit = params.stop_token_ids, params.max_new_tokens
        stopped = item.completion_ids[-1] in stop
        seen.add((item.request_id, item.finish_reason))
        assert not set(item.completion_ids[:-1]) & set(stop)
        assert item.finish_reason == ("stop" if stopped else "length")
        assert len(item.completion_ids) <= limit
        assert stopped or len(item.completion_ids) == limit
    assert {("r0", "stop"), ("r1", "stop"), ("r2", "length")} <= seen
    assert ("r2", "stop") not in seen


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_completions_end_with_the_context(name: str) -> None:
    if name == "llama":
        model = build("llama", max_position_embeddings=12)
    else:  # learned positions: one too many would be an index error
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=12, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
        )
        model = transformers.GPT2LMHeadModel(config).eval()
    requests = [
        make_request(
            0, length=11, stop_token_ids=(), n=1
        ),  # one of 13 rows: stays in the batch for a while when finished
        make_request(1, length=3, stop_token_ids=(), n=9),
        make_request(2, length=8, stop_token_ids=(), n=3, max_new_tokens=4),
    ]
    generations = generate(LocalEngine(model), requests)
    assert [len(g.completion_ids) for g in generations] == [1] + [9] * 9 + [4] * 3
    assert {g.finish_reason for g in generations} == {"length"}
    assert_logprobs_are_the_models(model, requests, generations)
    with pytest.raises(UserError, match=r"request r3: the prompt has 12 tokens .* context 12"):
        generate(LocalEngine(model), [requests[0], make_request(3, length=12)])


def test_each_prompt_is_prefilled_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[int] = []
    prefill = NextToken.prefill

    def counted(self: NextToken, cache: Any, ids: Tensor, starts: Tensor) -> Tensor:
        prompts.append(ids.shape[0])
        return prefill(self, cache, ids, starts)

    wide, narrow = LocalEngine(llama, max_rows=8), LocalEngine(llama, max_rows=4)
    monkeypatch.setattr(NextToken, "prefill", counted)
    generate(wide, [make_request(index, n=4) for index in range(6)])
    assert sum(prompts) == 6
    prompts.clear()
    generate(narrow, [make_request(0, n=10)])
    assert sum(prompts) == 3  # ten rows in slices of four


def test_completions_share_a_row_until_their_tokens_part(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each distinct beginning is computed once; completions are those of rows of their own."""
    widths: list[int] = []
    own = NextToken.decode

    def counted(self: NextToken, cache: Any, ids: Tensor, *more: Any) -> Tensor:
        widths.append(ids.shape[0])
        return own(self, cache, ids, *more)

    # At a low temperature, beginnings are often the same. Finished rows go at once.
    monkeypatch.setattr(engine_module, "RETIRE_FRAC", 0.0)
    requests = [make_request(index, n=6, temperature=0.4) for index in range(5)]
    single = generate(LocalEngine(llama, max_rows=1), requests)
    engine = LocalEngine(llama)
    monkeypatch.setattr(NextToken, "decode", counted)
    shared = generate(engine, requests)
    for ours, theirs in zip(shared, single, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    beginnings = {
        (item.request_id, item.completion_ids[:length])
        for item in shared
        for length in range(1, len(item.completion_ids))
    }
    assert sum(widths) == len(beginnings) < sum(len(g.completion_ids) - 1 for g in shared)
    widths.clear()
    greedy = generate(engine, [make_request(0, n=8, temperature=0.0)])
    assert len({item.completion_ids for item in greedy}) == 1 and set(widths) == {1}


def test_the_head_sees_one_position_of_each_prompt(llama: Any) -> None:
    engine, widths = LocalEngine(llama), set()
    handle = llama.lm_head.register_forward_hook(
        lambda _module, inputs, _output: widths.add(inputs[0].shape[1])
    )
    try:
        generate(engine, [make_request(index) for index in range(3)])
    finally:
        handle.remove()
    assert widths == {1}


def test_the_models_modes_are_restored() -> None:
    model = build("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    engine = LocalEngine(model)
    requests = [make_request(index) for index in range(3)]
    with packed_forward(model):
        generations = generate(engine, requests)
        assert model.config._attn_implementation == PACKED
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].self_attn.training
    model.eval()
    assert_logprobs_are_the_models(model, requests, generations)  # so there was no dropout
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_concurrent_calls_do_not_disturb_each_other(llama: Any) -> None:
    engine = LocalEngine(llama.train())
    one, two = [make_request(0)], [make_request(1)]

    async def both() -> tuple[list[Generation], ...]:
        async def watch() -> list[Generation]:
            while engine._num_running:
                assert llama.training, "between bursts the modes are restored"
                assert not torch.is_inference_mode_enabled()
                await asyncio.sleep(0)
            return []

        return await asyncio.gather(engine.generate(one), engine.generate(two), watch())

    try:
        first, second, _ = asyncio.run(both())
    finally:
        llama.eval()
    assert [first, second] == [generate(engine, one), generate(engine, two)]


def test_tokens_are_reported_as_they_come(llama: Any) -> None:
    reports: list[int] = []
    engine = LocalEngine(llama, max_rows=4)
    requests = [make_request(index) for index in range(4)]
    generations = asyncio.run(engine.generate(requests, on_tokens=reports.append))
    assert sum(reports) == sum(len(item.completion_ids) for item in generations)
    assert len(reports) > 3
    assert asyncio.run(engine.generate([], on_tokens=reports.append)) == []


def test_a_request_is_yielded_when_it_is_done_and_others_are_not(llama: Any) -> None:
    """Each as a whole, also when its rows do not fit at once; and the same as all together."""
    engine = LocalEngine(llama, max_rows=4)
    requests = [make_request(i, n=6, max_new_tokens=4 + 20 * (i == 0)) for i in range(4)]
    sampled, seen = 0, []

    def count(tokens: int) -> None:
        nonlocal sampled
        sampled += tokens

    async def run() -> list[list[Generation]]:
        done = []
        async for generations in engine.stream(requests, on_tokens=count):
            done.append(generations)
            seen.append(sampled)
        return done

    done = asyncio.run(run())
    assert [[g.index for g in own] for own in done] == [[*range(6)]] * 4
    assert len({own[0].request_id for own in done}) == 4
    assert seen[0] < seen[-1]
    by_id = {own[0].request_id: own for own in done}
    assert generate(engine, requests) == [g for request in requests for g in by_id[request.id]]


def test_the_engine_samples_with_loaded_weights() -> None:
    target, source = build("llama"), build("llama", seed=1)
    engine, requests = LocalEngine(target), [make_request(index) for index in range(3)]
    before = generate(engine, requests)
    pointers = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    asyncio.run(engine.load_weights(source.state_dict(), version=7))
    after = generate(engine, requests)
    assert {g.policy_version for g in before} == {0}
    assert {g.policy_version for g in after} == {7}
    assert pointers == {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    assert [g.completion_ids for g in after] != [g.completion_ids for g in before]
    expected = generate(LocalEngine(source), requests)
    assert [g.completion_ids for g in after] == [g.completion_ids for g in expected]


def test_the_learners_own_weights_are_not_copied(llama: Any) -> None:
    engine = LocalEngine(llama)
    versions = [parameter._version for parameter in llama.parameters()]
    asyncio.run(engine.load_weights(llama.state_dict(), version=3))
    assert [parameter._version for parameter in llama.parameters()] == versions
    assert engine.policy_version == 3


def test_one_name_is_enough_for_tied_weights() -> None:
    target = build("llama", tie_word_embeddings=True)
    source = build("llama", tie_word_embeddings=True, seed=1)
    for missing in ("lm_head.weight", "model.embed_tokens.weight"):
        weights = {name: t + 1 for name, t in source.state_dict().items() if name != missing}
        asyncio.run(LocalEngine(target).load_weights(weights, version=1))
        assert torch.equal(target.lm_head.weight, source.lm_head.weight + 1)


@pytest.mark.parametrize("mistake", ["unknown", "shape", "missing"])
def test_wrong_weights_change_nothing(mistake: str) -> None:
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    name = "model.norm.weight"
    if mistake == "unknown":
        weights[name := "model.norm.bias"] = torch.zeros(3)
    elif mistake == "shape":
        weights[name] = weights[name][:-1]
    else:
        del weights[name]
    engine = LocalEngine(model)
    with pytest.raises(ValueError, match=name):
        asyncio.run(engine.load_weights(weights, version=1))
    assert engine.policy_version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_wait_for_requests_in_flight() -> None:
    model, source = build("llama"), build("llama", seed=1)
    engine, requests = LocalEngine(model), [make_request(index) for index in range(3)]
    expected = generate(engine, requests)

    async def both() -> list[Generation]:
        running = asyncio.create_task(engine.generate(requests))
        await asyncio.sleep(0)
        await engine.load_weights(source.state_dict(), version=1)
        return await running

    assert asyncio.run(both()) == expected


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_parameters_out_of_range_name_the_request(
    llama: Any, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"request r1: {words}"):
        generate(LocalEngine(llama), [make_request(0), make_request(1, **params)])


def test_wrong_ids_name_the_request(llama: Any) -> None:
    params = SamplingParams(max_new_tokens=1)
    for prompt in ((1, VOCAB), (-1, 1)):
        request = GenerationRequest(id="far", prompt_ids=prompt, params=params)
        with pytest.raises(ValueError, match="request far: a prompt id is outside"):
            generate(LocalEngine(llama), [request])
    with pytest.raises(ValueError, match="two requests have the id r0"):
        generate(LocalEngine(llama), [make_request(0), make_request(0)])
    with pytest.raises(ValueError, match="max_rows is 0"):
        LocalEngine(llama, max_rows=0)


def test_a_padding_id_without_embedding_does_not_matter(llama: Any) -> None:
    requests = [make_request(index) for index in range(3)]
    expected = generate(LocalEngine(llama), requests)
    assert generate(LocalEngine(llama, pad_token_id=VOCAB + 5), requests) == expected


def test_weights_that_are_not_finite_are_a_user_error() -> None:
    model = build("llama")
    engine = LocalEngine(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match=r"r0, weights of version 0: .*not finite"):
        generate(engine, [make_request(0)])
    with pytest.raises(UserError, match="LlamaForCausalLM: its logits are not finite"):
        LocalEngine(model)
