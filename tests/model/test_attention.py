"""Packed hidden states and gradients against one sequence at a time, in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.errors import UserError
from rosd_fast.model.attention import (
    attend,
    check_packing,
    head,
    hidden_states,
    logits,
    packed_forward,
    sequence_lengths,
    use_exact_attention,
)
from rosd_fast.types import PackedSequences

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
}


def tiny(family: str, dtype: torch.dtype = torch.float64, **changes):
    """A random model with weights large enough that attention is far from uniform."""
    config = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES.get(family, {}) | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    use_exact_attention(model)
    return model


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
    """The model's own attention on each sequence alone."""
    ids = packed.input_ids.split(sequence_lengths(packed.cu_seqlens))
    return torch.cat(
        [model.get_decoder()(input_ids=x[None], use_cache=False).last_hidden_state[0] for x in ids]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_equal_one_sequence_at_a_time(family):
    model = tiny(family)
    # These compute norms, or Gemma 2 its softmax, in float32 whatever the model's dtype.
    bound = 3e-6 if family in ("Gemma2", "Gemma3Text", "Cohere") else 1e-10
    packed = packed_sequences([9, 1, 14, 9, 5])
    seed = torch.randn(38, 32, dtype=torch.float64)
    results = []
    for compute in (hidden_states, one_at_a_time):
        model.zero_grad()
        states = compute(model, packed)
        (states * seed).sum().backward()
        # The output head has no part in hidden states.
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((states.detach(), grads))
    (states, grads), (expected, expected_grads) = results
    assert grads.keys() == expected_grads.keys() and len(grads) > 10
    torch.testing.assert_close(states, expected, rtol=0, atol=bound * float(expected.abs().max()))
    for key, value in expected_grads.items():
        scale = float(value.abs().max()) + 1e-3
        assert float((grads[key] - value).abs().max()) <= bound * scale, key


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits(family):
    model = tiny(family)
    ids = packed_sequences([11])
    expected = model(input_ids=ids.input_ids[None], use_cache=False).logits[0]
    actual = logits(hidden_states(model, ids), head(model))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    check_packing(model)


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


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attend_against_plain_softmax(window, softcap, scale):
    torch.manual_seed(1)
    length = 8
    query = torch.randn(1, 4, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, length, 8, dtype=torch.float64)
    actual = attend(query, key, value, scale=scale, dropout=0.0, window=window, softcap=softcap)
    for h in range(4):
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            scores = key[0, h // 2, first : i + 1] @ query[0, h, i] * (scale or 8**-0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            expected = scores.softmax(0) @ value[0, h // 2, first : i + 1]
            torch.testing.assert_close(actual[0, h, i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
        ("Llama4Text", {"intermediate_size_mlp": 48, "num_local_experts": 2}, "chunked_attention"),
        ("Bert", {}, "both directions"),
        ("Bloom", {"n_head": 4, "n_layer": 1}, "attention interface"),
        ("Mamba", {}, "linear_attention"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(family, changes, says):
    with pytest.raises(UserError, match=says):
        check_packing(tiny(family, torch.float32, **changes))


def test_a_head_that_is_not_the_last_step_is_refused():
    model = tiny("Granite", torch.float32)
    model.config.logits_scaling = 1.0  # what `head` reads; the model itself keeps dividing
    model.logits_scaling = 3.0
    forward = type(model).forward

    def lying(**kwargs):
        output = forward(model, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = lying
    with pytest.raises(UserError, match="own logits"):
        check_packing(model)


LLAMA = tiny("Llama")
