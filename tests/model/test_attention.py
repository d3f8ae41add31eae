"""Packed hidden states and gradients against processing each sequence alone, in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import _lazy_define_process_function

from rosd_fast.batch.packing import pack
from rosd_fast.model import attention, sdpa
from rosd_fast.model.attention import backbone
from rosd_fast.model.head import head, logits
from rosd_fast.model.layouts import check_layout, hidden_states, packed_forward
from rosd_fast.model.sdpa import Rule, attend
from rosd_fast.types import PackedSequences, TrainSample
from tests.float64 import float64
from tests.tiny import tiny_model

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma3Text": SLIDING,
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Gemma2": SLIDING | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "GptOss": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": None,
    },
    "Llama4Text": {
        "attention_chunk_size": 4,
        "attn_temperature_tuning": False,
        "layer_types": ["chunked_attention", "full_attention"],
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "moe_layers": [1],
    },
}


def tiny(family: str, dtype: torch.dtype = torch.float64, **changes):
    return tiny_model(family, dtype, **IDS | FAMILIES.get(family, {}) | changes)


def packed_sequences(lengths: list[int], seed: int = 0) -> PackedSequences:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return PackedSequences(
        input_ids=torch.randint(0, 64, (total,), generator=generator),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)),
        gather=torch.arange(total),
    )


def one_at_a_time(model, packed: PackedSequences) -> torch.Tensor:
    """The states of the model's own attention on each sequence alone."""
    ids = packed.input_ids.split(packed.lengths)
    return torch.cat(
        [backbone(model)(input_ids=x[None], use_cache=False).last_hidden_state[0] for x in ids]
    )


def gradients(model) -> dict[str, torch.Tensor]:
    # The output head has no part in hidden states.
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict, expected: dict) -> None:
    """Assert that the error of each tensor is at most 1e-10 of its largest entry."""
    assert actual.keys() == expected.keys() and len(expected) > 10
    for key, value in expected.items():
        error = float((actual[key] - value).abs().max())
        assert error <= 1e-10 * (float(value.abs().max()) + 1e-3), key


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_equal_one_sequence_at_a_time(family):
    model = tiny(family)
    packed = packed_sequences([9, 1, 14, 9, 5])
    seed = torch.randn(38, 32, dtype=torch.float64)
    results = []
    for compute in (hidden_states, one_at_a_time):
        model.zero_grad()
        with float64():
            states = compute(model, packed)
            (states * seed).sum().backward()
        results.append({"states": states.detach(), **gradients(model)})
    assert_equal(*results)


@st.composite
def groups(draw):
    """Samples of one to three prompts; completions and teacher prompts share prefixes, too."""
    ids = st.lists(st.integers(3, 5), min_size=1, max_size=12).map(tuple)
    prompts = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=3))
    samples = []
    for index in range(draw(st.integers(1, 6))):
        (student, teacher), completion = draw(st.sampled_from(prompts)), draw(ids)
        start = draw(st.integers(0, len(completion) - 1))
        samples.append(
            TrainSample(
                rollout_id=f"r{index}",
                problem_id="p",
                student_prompt_ids=student,
                teacher_prompt_ids=teacher + draw(ids),
                completion_ids=completion,
                logprobs=(0.0,) * len(completion),
                start=start,
                end=draw(st.integers(start + 1, len(completion))),
            )
        )
    return samples


@pytest.mark.parametrize("family", FAMILIES)
@given(samples=groups(), min_shared=st.integers(1, 4), max_tokens=st.sampled_from([60, 1000]))
@settings(max_examples=12, deadline=None)
def test_shared_tokens_change_nothing(family, samples, min_shared, max_tokens):
    """States that predict distilled tokens, and gradients, equal those of each sample alone."""
    model = MODELS[family]
    batches = pack(samples, max_tokens=max_tokens, min_shared=min_shared)
    by_id = {sample.rollout_id: sample for sample in samples}
    seeds = {
        name: torch.randn(sample.num_tokens, 32, dtype=torch.float64)
        for name, sample in by_id.items()
    }
    for side in ("student", "teacher"):
        with float64():
            shared = states_and_gradients(model, side, samples, seeds, batches)
            alone = states_and_gradients(model, side, samples, seeds, None)
        assert_equal(shared, alone)


def states_and_gradients(model, side, samples, seeds, batches) -> dict[str, torch.Tensor]:
    """The states that predict each sample's tokens, and the gradients of a sum over them.

    batches: None for each sample on its own, through the model's own attention.
    """
    model.zero_grad()
    found = {}
    for batch in batches or []:
        packed = getattr(batch, side)
        states = hidden_states(model, packed)
        for index, name in enumerate(batch.rollout_ids):
            found[name] = states[packed.gather[batch.sample_index == index]]
    for sample in [] if batches else samples:
        prompt_ids = getattr(sample, f"{side}_prompt_ids")
        ids = torch.tensor([prompt_ids + sample.completion_ids])
        whole = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        first, last = (len(prompt_ids) - 1 + place for place in (sample.start, sample.end))
        found[sample.rollout_id] = whole[first:last]
    torch.stack([(states * seeds[name]).sum() for name, states in found.items()]).sum().backward()
    return {name: states.detach() for name, states in found.items()} | gradients(model)


def test_shared_prefixes_are_computed_once(monkeypatch):
    """1 prompt of 30 tokens and 4 completions of 5: 50 tokens go through the layers, not 140."""
    seen = []
    forward = type(LLAMA.model.layers[0]).forward

    def count(self, hidden, *args, **kwargs):
        seen.append(hidden.shape[1])
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(LLAMA.model.layers[0]), "forward", count)
    lengths = (30, 5, 5, 5, 5)
    packed = PackedSequences(
        input_ids=torch.arange(50),
        position_ids=torch.cat([torch.arange(30), *[torch.arange(30, 35)] * 4]),
        cu_seqlens=(0, *accumulate(lengths)),
        gather=torch.arange(50),
        parents=(-1, 0, 0, 0, 0),
    )
    hidden_states(LLAMA, packed)
    assert seen == [50, 50]


@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "Gemma2", "GptOss"])
def test_flash_attention_gets_what_sdpa_gets(family, monkeypatch):
    """A few equivalent lines stand for the variable-length call that a GPU would run."""
    calls = []

    def flash_attn_varlen_func(  # the interface of flash-attn 2
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        deterministic=False,
    ):  # fmt: skip
        calls.append(window_size)
        assert causal and dropout_p == 0.0 and cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        parts = [
            attend(
                *(x[None].transpose(1, 2) for x in (q[i:j], k[m:n], v[m:n])),
                rule=Rule(
                    scale=softmax_scale,
                    window=None if window_size[0] < 0 else window_size[0] + 1,
                    softcap=softcap or None,
                ),
            )[0].transpose(0, 1)
            for (i, j), (m, n) in zip(
                pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
            )
        ]
        return torch.cat(parts)

    def can_flash(query, rule):
        return rule.chunk is None and (rule.sinks is None or rule.window is None)

    model = tiny(family, torch.float32)
    samples = [
        TrainSample(
            rollout_id=f"r{index}",
            problem_id="p",
            student_prompt_ids=(*range(3, 12),),
            teacher_prompt_ids=(1,),
            completion_ids=(index, 20, 21, 22, 23),
            logprobs=(0.0,) * 5,
            start=0,
            end=5,
        )
        for index in range(3)
    ]
    packed = pack(samples, max_tokens=100, min_shared=4)[0].student
    assert packed.parents == (-1, 0, 0, 0)
    with torch.no_grad():
        expected = hidden_states(model, packed)
        functions = (None, flash_attn_varlen_func, None, None, None)
        process: Any = _lazy_define_process_function(flash_attn_varlen_func)
        if hasattr(modeling_flash_attention_utils, "_process_with_kvcache_kwargs_fn"):
            process = (process, None)  # since 5.19 or so there is a second one
        monkeypatch.setattr(
            modeling_flash_attention_utils,
            "lazy_import_flash_attention",
            lambda name: (functions, process),
        )
        monkeypatch.setattr(attention, "can_flash", can_flash)
        actual = hidden_states(model, packed)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    windows = {"Qwen3": [-1, -1], "Mistral": [3, 3], "Gemma2": [3, -1], "GptOss": [-1]}[family]
    assert [window[0] for window in calls] == windows


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits(family):
    model = tiny(family)
    ids = packed_sequences([11])
    expected = model(input_ids=ids.input_ids[None], use_cache=False).logits[0]
    actual = logits(hidden_states(model, ids), head(model))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    check_layout(model)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_any_lengths(lengths, seed):
    model, packed = LLAMA, packed_sequences(lengths, seed)
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(model, packed), one_at_a_time(model, packed), rtol=0, atol=1e-9
        )


def test_a_sequence_does_not_see_its_neighbours():
    packed = packed_sequences([6, 7])
    other = packed.input_ids.clone()
    other[:6] = (other[:6] + 1) % 64
    changed = PackedSequences(
        input_ids=other,
        position_ids=packed.position_ids,
        cu_seqlens=packed.cu_seqlens,
        gather=packed.gather,
    )
    with torch.no_grad():
        before, after = hidden_states(LLAMA, packed), hidden_states(LLAMA, changed)
    assert torch.equal(before[6:], after[6:]) and not torch.equal(before[:6], after[:6])


def test_the_model_is_left_as_it_was():
    model = tiny("Llama")
    ids = torch.randint(0, 64, (2, 9))
    expected = model(input_ids=ids).logits
    with packed_forward(model), packed_forward(model):
        hidden_states(model, packed_sequences([3, 4]))
        assert model.config._attn_implementation == "rosd_packed"
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(ZeroDivisionError), packed_forward(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert "rosd_packed" not in model.config.to_json_string()


def test_logits_are_never_computed(monkeypatch):
    model = tiny("Llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("logits were computed"))
    hidden_states(model, packed_sequences([3, 4]))


@pytest.mark.parametrize("before", [0, 1, 9])
@pytest.mark.parametrize("reach", [{}, {"window": 1}, {"window": 3}, {"window": 50}, {"chunk": 3}])
@pytest.mark.parametrize("scores", [{}, {"softcap": 1.5}, {"sinks": True}])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("held", [2**26, 150])
def test_attend_against_plain_softmax(before, reach, scores, scale, held, monkeypatch):
    """held: elements of scores that are held at once; 150 takes queries in blocks."""
    torch.manual_seed(1)
    monkeypatch.setattr(sdpa, "MAX_SCORES", held)
    length = 8
    query = torch.randn(1, 4, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, before + length, 8, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64) if "sinks" in scores else None
    rule = Rule(scale=scale, **reach | scores | {"sinks": sinks})
    actual = attend(query, key, value, rule)
    for h in range(4):
        for i in range(length):
            place = before + i
            first = 0
            if "window" in reach:
                first = max(0, place - reach["window"] + 1)
            if "chunk" in reach:
                first = place - place % reach["chunk"]
            found = key[0, h // 2, first : place + 1] @ query[0, h, i] * (scale or 8**-0.5)
            if "softcap" in scores:
                found = scores["softcap"] * torch.tanh(found / scores["softcap"])
            total = found.exp().sum() + (0 if sinks is None else sinks[h].exp())
            expected = found.exp() / total @ value[0, h // 2, first : place + 1]
            torch.testing.assert_close(actual[0, h, i], expected, rtol=0, atol=1e-12)


def test_sinks_have_gradients():
    """Against the derivative of the formula, by finite differences."""
    torch.manual_seed(2)
    query = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 1, 1, 7, 4, dtype=torch.float64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: attend(q, k, v, Rule(sinks=s, window=3)),
        (query, key.requires_grad_(), value.requires_grad_(), sinks),
    )


MODELS = {family: tiny(family) for family in FAMILIES}
LLAMA = MODELS["Llama"]
